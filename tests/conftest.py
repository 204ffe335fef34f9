"""For the whole session: nothing is ever fetched, and `gpu` tests are skipped without CUDA."""

import os

os.environ["GNETLAB_OFFLINE"] = "1"
# One thread per process, kernels included, set before torch loads: workers that each spin a thread
# per core fight over the cores and take twenty times as long.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from torch import nn


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture
def torchvision_googlenet():
    """A function that builds torchvision's own GoogLeNet with everything in it random.

    Weights are scaled so that outputs are of order 1; batch norm's affine parameters and
    statistics are random too, so that none of them can be mistaken or forgotten unnoticed.
    """
    from torchvision.models import googlenet

    def build(num_classes=20, **options):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = googlenet(
                weights=None, init_weights=False, num_classes=num_classes,
                dropout=0.0, dropout_aux=0.0, **options,
            )  # fmt: skip
            for module in model.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight)
                elif isinstance(module, nn.BatchNorm2d):
                    nn.init.uniform_(module.weight, 0.5, 1.5)
                    nn.init.normal_(module.bias, std=0.2)
                    nn.init.normal_(module.running_mean, std=0.2)
                    nn.init.uniform_(module.running_var, 0.5, 1.5)
        return model

    return build
