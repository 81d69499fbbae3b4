"""Ground truth on a CUDA machine: measured memory and time of real training steps beside what was predicted.

``measure`` runs a table of cases, ``budget`` random ones close to a pretended limit, ``predict`` repeats predictions
with today's code for records made earlier, ``table`` writes the documentation from the records. README.md beside this
file has the command lines. On a CPU the same code runs with small models.
"""
