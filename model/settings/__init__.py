"""What the user set, and what is decided from it before a run is built.

    config, flags       all flags of train.py and eval.py; the command line made of them
    recipes, fitting    flags to start from; flags that fit the data
    unread              flags that were given and have no effect
    protocol            how a run is evaluated: what is decided and recorded

May import every room to its left: their ``config.py``, and the device.
"""
