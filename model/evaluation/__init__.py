"""Evaluation of a possibly sharded model on held-out items; may import step and rooms below it.

users: encoded users. evaluate: ranks of the targets, on any number of ranks. top_items: exact best
items over the catalog, in parts and over ranks. chunk_maxima: which items to look at; a Triton
kernel on CUDA. catalog_scores: scores of this rank's slice of the catalog, part by part. metrics:
HR, NDCG, MRR and others from ranks. listed: coverage, popularity and novelty of the best items.
ranked_users: every user's ranks. details: metrics of groups of users, intervals. comparison: two
models on the same users. report: the printed table and eval_<split>.json.
"""
