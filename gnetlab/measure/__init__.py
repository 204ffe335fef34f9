"""Measuring: most functions return a tidy frame. Imports gnetlab.net, never matplotlib.

hooks           feature maps by name; the only place where hooks are registered
costs           multiply-adds, parameters, bytes and memory per layer (with shapes and rules)
counters        what other tools print for the same network
paper, sweeps   the paper's own numbers; other widths and image sizes
latency, layers, roofline   time: measured, per layer, predicted
activations, correlation, ablation, receptive   what the branches put out, see, and are needed for
attribution, visualize      where a branch looks, and what a channel looks for
specialization, confound    what channels select for, and whether the kernel is why
gradients       gradient by layer and loss
loop, training, bundled     one training; a grid of them; the recipe of the bundled weights
steps, distributed          what a training does in one step, and with several processes
devices, memory             CPU, CUDA and MPS; batches that fit into their memory
sparsity        an Inception module as one sparse convolution
"""
