"""The training loop, its log and its profile; may import every room of ``model`` but ``run``.

trainer: epochs of pipelined steps, evaluation, checkpoints. config: flags, and the learning rate by
the position in training. agreement: ranks agree on saving and stopping; lost ranks are named.
progress: the host's lead over the GPU, losses between log lines. run_log: metrics.jsonl,
log lines or a progress bar. profile: a trace of steps.
"""
