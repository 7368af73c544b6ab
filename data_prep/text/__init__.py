"""From a document to tokens and sentence ends."""
