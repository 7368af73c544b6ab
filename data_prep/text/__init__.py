"""From a document to tokens and sentence ends.

Sentence ends: `segmenter` cuts by `segment_rules`; `sentences` moves the cuts to token boundaries.
"""
