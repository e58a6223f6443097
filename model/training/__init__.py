"""The training loop and what surrounds its steps.

    trainer      epochs of pipelined steps, evaluation, checkpoints
    config       flags of the training loop
    schedule     the learning rate as a function of the position in training
    agreement    ranks agree on saving and stopping; lost ranks are named
    progress     batches fed to the pipeline, the host's lead over the GPU, losses between log lines
    run_log      metrics.jsonl, TensorBoard events, log lines or a progress bar
    profile      a trace of a few steps

May import every room of ``model`` but ``run``, and pipeline's batches and training.
"""
