"""Generic training code: knows nothing about wav2vec 2.0."""
