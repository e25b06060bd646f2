"""Stand-alone data tools: file lists, labels, dictionary, downloads and small corpora."""
