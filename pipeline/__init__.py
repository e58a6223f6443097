"""The data pipeline: from a ratings file to the batches of one training step.

    sources/       ratings files (formats/) or generators -> tables: user, item, rating, timestamp
    preparation/   number the ids, filter, group by user -> SequenceStore, mapped by every rank
    training/      draw windows, mask items, pad, draw negatives -> batches/: TrainBatch
    evaluation/    held-out items, sampled negatives -> batches/: EvalBatch

Every stage is one small class on `torchdata.nodes` (stage.py), usable separately. Example, with
a file ``clicks.csv`` whose columns are user, item and time::

    from pipeline.preparation.prepare import describe, prepare
    from pipeline.sources.config import DataConfig
    from pipeline.training.cloze import MaskConfig
    from pipeline.training.loader import LoaderConfig, TrainLoader
    from pipeline.training.windows import WindowConfig

    store = prepare(DataConfig(dataset_path="clicks.csv", min_user_count=3))
    print(describe(store))                                         # what each stage kept
    history = store.items[store.offsets[0] : store.offsets[1]]     # user 0, oldest item first
    print(store.catalog.item_id(history[-1]))                      # its newest item's original id

    loader = TrainLoader(store, WindowConfig(max_len=50), MaskConfig(), LoaderConfig())
    for packed in loader.epoch(0):
        batch = packed.unpack()
        print(batch.features["item"].values(), batch.masked, batch.targets)

Item ids are dense: 1..V; 0 is padding, V+1 the mask token. A user's mistake raises `UserError`.
"""
