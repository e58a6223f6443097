"""What TensorBoard shows of a run; rank 0 writes it.

board: the events of a training run.    result: those of one result of an evaluation.
tags: names of the charts, and a layout with both protocols in one chart.    hparams: flags.
markdown: text and tables, safe for any title.    examples: what five users are recommended.
projector: vectors of the most popular items.    config: flags.
Imports: ``model.evaluation`` and the rooms below it.
"""
