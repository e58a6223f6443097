"""From histories of any origin to batches of users to recommend to.

    histories    histories in dense ids: of the store, of lists of ids, of ratings
    batches      users of one rank, in the users' order

May import evaluation and the rooms below it.
"""
