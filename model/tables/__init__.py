"""The embedding tables, distributed over the ranks.

distribute    model -> DistributedModelParallel     sharding_plan  which rank holds which rows
item_table    lookup and update by own kernels, with row_lookup, row_exchange, table_update
local_collection  TorchRec's lookup on one rank     upstream  private names of TorchRec, FBGEMM
config        flags
Imports: ``model.bert4rec`` and the rooms below it.
"""
