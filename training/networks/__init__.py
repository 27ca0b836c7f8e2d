"""The modules of a scoring graph: standardisation, autoencoders, and the score."""
