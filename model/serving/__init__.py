"""From a trained model to recommendations.

config: flags of recommend.py. eligible: the items that may be recommended. vectors: of items and
users, and the items whose vectors fit best. recommender: the model, its catalog, and what it
recommends. rows: rows of a table from lists. output: files of rows, by extension. shown: a list as
text. answer: what recommend.py does with its flags.

May import run and the rooms below it.
"""
