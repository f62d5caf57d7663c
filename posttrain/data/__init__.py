"""Data sets become records, records become packed batches.

Reading order: ``files`` (where rows come from), ``columns`` (what they are called), ``template`` and ``render`` (text to tokens),
``prompts``, ``demos``, ``pairs`` (rows to records), ``load`` (all of that in one call), ``sampler`` (in which order), ``rows`` and
``pack`` (records to batches).
"""
