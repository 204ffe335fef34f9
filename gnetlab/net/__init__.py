"""What is measured: the network, its weights and its data. Imports nothing of the other rooms.

architecture   Table 1 as data, `Architecture`, `PRESETS`
model          `googlenet()` and what it builds
fuse           the same network for inference
weights, bvlc  checkpoints: found, read safely, fitted
data           photographs, crops, data sets by name, preprocessing
datasets       CIFAR-10 and Imagenette
augment        what `gnetlab train bundled` learns from
"""
