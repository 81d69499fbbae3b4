"""The surface of badam 1.4's optimizer, with its habits that the comparison has to deal with, in a package of its own.

It matches prefixes anywhere in a name, chooses the next block's index on entering a block, switches early, and prints.
"""

from __future__ import annotations

SOURCE = """
import torch
from torch import nn

class BlockOptimizer(torch.optim.Optimizer):
    def __init__(self, base_optimizer, named_parameters_list, block_prefix_list=None, switch_block_every=50,
                 switch_mode="descending", verbose=1):
        self.base_optimizer, self.named = base_optimizer, named_parameters_list
        self.blocks, self.every, self.global_step = block_prefix_list, switch_block_every, 0
        self.current_block_idx = 0
        self.defaults, self.param_groups = base_optimizer.defaults, base_optimizer.param_groups
        super().__init__(self.param_groups, self.defaults)
        self.switch_trainable_params()

    def switch_trainable_params(self, verbose=1):
        prefixes = self.blocks[self.current_block_idx]
        print("now training", prefixes)
        self.param_idx2lp, self.param_idx2hp = {}, {}
        for index, (name, parameter) in enumerate(self.named):
            active = any(prefix in name for prefix in prefixes)
            parameter.requires_grad_(active)
            parameter.grad = None
            if active:
                self.param_idx2lp[index] = parameter
                self.param_idx2hp[index] = nn.Parameter(parameter.detach().float().clone())
        self.base_optimizer.param_groups = [{**self.defaults, "params": list(self.param_idx2hp.values())}]
        self.base_optimizer.state.clear()
        self.current_block_idx = (self.current_block_idx + 1) % len(self.blocks)

    def step(self):
        for index, low in self.param_idx2lp.items():
            self.param_idx2hp[index].grad, low.grad = low.grad.float(), None
        self.base_optimizer.step()
        for index, low in self.param_idx2lp.items():
            low.data.copy_(self.param_idx2hp[index].data)
        self.global_step += 1
        if (self.global_step + 1) % self.every == 0:
            self.switch_trainable_params()
"""
