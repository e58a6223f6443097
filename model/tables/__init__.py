"""The embedding tables, distributed over the ranks.

distribute    model -> DistributedModelParallel     sharding_plan  which rank holds which rows
item_table    lookup and update by own kernels, with row_lookup, table_update
row_exchange, all_to_all  rows of other ranks       collections  FBGEMM's lookup
upstream      private names of TorchRec and FBGEMM  cpu_adam  FBGEMM's module with Adam on CPU
config        flags
Imports: ``model.bert4rec`` and the rooms below it.
"""
