"""wav2vec 2.0: model, objectives and the assembly of a run.

Shapes are written as suffixes of names and in docstrings, batch first everywhere:

    B  batch: rows (utterances)              S  samples of a waveform
    T  frames (20 ms at 16 kHz)              C  channels of the convolutions
    D  width of the transformer              H  attention heads
    M  masked frames per row                 R  masked frames of a batch: sum of rows x M over its sub-batches
    N  negatives per masked frame            G  groups of the codebook
    V  codes per group                       L  labels of a transcript
    K  output symbols                        P  pooled frames inside the Hourglass
"""
