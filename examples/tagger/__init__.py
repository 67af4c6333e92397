"""The parts of train_tagger.py: a tagger trained with torch's layer and with fusedrnn's."""
