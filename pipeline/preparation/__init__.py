"""From ratings to histories on disk, once per data set and set of filters.

prepare.py   all stages in order
stages.py    encode ids, filter, densify, group by user
store.py     the sequence store: histories, memory-mapped by every rank
catalog.py   original ids and titles of the dense ids
"""
