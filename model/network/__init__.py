"""The network after the table lookup, in plain torch (no TorchRec).

encoder       transformer layers        attention     within rows of a jagged batch
padded        the same on padded rows
head          scores and loss           distillation  teachers' logits
times         times as input            initial_rows  item vectors to start from
attributes    rows of attributes, added to those of their items
dense_step    encoder and head of a training step; CUDA graphs of the encoder
config        flags
Imports: ``model.losses``, ``model.kernels``, ``model.execution``, ``pipeline.batches``,
``pipeline.cooccurrence``.
"""
