"""From ratings to histories on disk, once per data set and set of filters.

prepare.py   all stages in order
stages.py    encode ids, filter, densify
held.py      what a stage holds for another pass: in memory, else on disk; ranges of users
memory.py    how much memory, and the unnamed files beyond it
grouping.py  drop duplicates, sort by time, group by user
parts.py     training, validation and test part of each history
time_split.py marks the parts by points in time
store.py     the sequence store: histories, memory-mapped by every rank
catalog.py   original ids and titles of the dense ids
items.py     titles and attributes from a table of the items
checks.py    warnings of what may mean something else; units of time
__main__.py  python -m pipeline.preparation: prepare, or say what would be
"""
