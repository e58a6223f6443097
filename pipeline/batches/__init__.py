"""The batches that are copied to the device. May import preparation.

train_batch    one rank's rows of one training step, packed or not
eval_batch     users whose held-out items are ranked at once
features       items and candidates as one KeyedJaggedTensor
packing        all tensors of a step in one allocation
attributes     attributes of items, as rows of the item table
times          times of items, and the gaps between them
"""
