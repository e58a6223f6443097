"""One training step and the pipelines that feed it.

train_step    forward, backward, update; through CUDA graphs    pipelines  copy batches ahead
optimizers    of the tables and of everything else, with
averaging     of gradients over the ranks    graphed_optimizer  an update as a CUDA graph
clipping      of the gradients' norm
flat_adamw    AdamW and clipping over one tensor, in CUDA graphs of whole steps; adamw_kernels
config        flags
Imports: ``model.tables`` and the rooms below it.
"""
