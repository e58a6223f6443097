"""The data pipeline: from a ratings file to batches for TorchRec.

Every stage is one small class on `torchdata.nodes`, the successor of TorchData's DataPipes (which
were removed in 0.10). Stages work on chunks (Arrow tables, NumPy arrays), never row by row, and
each can be used alone:

    preparation, once a data set, to disk            training and evaluation, on every rank
    -------------------------------------            --------------------------------------
    ReadRatings      .dat .csv .inter .parquet ...   SequenceStore
        |  Arrow: user, item, rating, timestamp          |  memory-mapped histories
    EncodeIds        text ids -> int32 codes         windows      max_len items, stride
        |  RatingChunk                                   |
    FilterRatings    --min_rating                    mask         cloze, by (seed, epoch, window)
    FilterItems      --min_item_count                    |
    FilterUsers      --min_user_count                batch        KeyedJaggedTensor, truly jagged
        |                                                |
    Densify          items 1..V, users 0..U-1        sharded model
        |
    GroupByUser      time order, stable
        |  Histories
    SequenceStore -------------------------------------> (memory-mapped by every rank)

A worked example, of a file ``clicks.csv`` with the columns user, item and time:

    from pipeline.sources.datasets import DataConfig
    from pipeline.preparation.prepare import describe, prepare

    store = prepare(DataConfig(dataset_path="clicks.csv", min_user_count=3))
    print(describe(store))                                   # what each stage kept
    history = store.items[store.offsets[7] : store.offsets[8]]     # user 7, oldest item first
    store.catalog.item_id(history[-1])                       # what the file calls it

Item ids are dense: 1..V, 0 is padding, V+1 the mask token. Leave-one-out: the last item of a user
is the test target, the one before it the validation target. A user's mistake raises `UserError`.
"""
