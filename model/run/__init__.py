"""The parts that train.py and eval.py connect.

    script              runs a script: flags first, then the slow imports
    folder, config_file the folder of a run; its flags, versions and facts
    trained             the trained model in a run folder, or an exported model
    teachers            the trained models that a run learns from
    resumed             learning rates and other flags that change when a run is resumed
    board               what TensorBoard shows of a run and of a result
    execution, build    decides how a run is executed; builds model, loader, evaluator
    warm_up             compiles a run's Triton kernels while its model is built
    rolling             a training for each window of --split_time
    measure             the final evaluation: all metrics, and every user's ranks

May import every other room except serving.
"""
