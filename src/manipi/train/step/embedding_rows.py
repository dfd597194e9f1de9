"""The token embedding of a flow policy: moments, gradient and average for the rows that were ever read.

Training reads a few hundred of its 257 152 rows, and no loss writes with it. Of a row without a gradient since the
beginning the moments are zero, its step is zero, and the average is the row itself; what is left is the decay, which
in float32 is nothing while `1 - lr · weight_decay` rounds to 1. Under that condition this is the dense update, exactly:

    table   [V, D]   the parameter; its gradient is sparse
    index   [n]      the rows that had a gradient, in the order in which they came
    weight  [n, D]   those rows, which is what the optimizer sees; written back into the table after every step
"""

import torch
from torch import Tensor, nn

from manipi.model.config import Pi0FastConfig
from manipi.model.shards import fill, whole
from manipi.train.config import TrainConfig
from manipi.train.parallel import ALONE, World

NAME = "gemma.token_embedding"


def rows_are_enough(config: TrainConfig, world: World = ALONE) -> bool:
    """Whether rows without a gradient stay as they are.

    Not where the table writes tokens, nor where blocks of 256 moments share a scale, nor where the gradient is reduced
    over processes, which needs it dense.
    """
    rate = config.optimizer.lr * config.optimizer.lr_scale.vlm
    decays = config.optimizer.kind == "adamw" and rate * config.optimizer.weight_decay >= 2**-25
    dense = isinstance(config.model, Pi0FastConfig) or config.optimizer.state_bits == 8
    return not (decays or dense or world.size > 1)


class TouchedRows:
    """The rows of a table that were read so far; at the start none.

    Args:
        table: the parameter [V, D].
    """

    def __init__(self, table: nn.Parameter):
        self.table = table
        self.index = torch.empty(0, dtype=torch.long, device=table.device)
        self.weight = nn.Parameter(table.detach()[self.index])
        self._slots = torch.full((len(table),), -1, device=table.device)

    @torch.no_grad()
    def grow(self, ids: Tensor, optimizer: torch.optim.Optimizer, average: dict[str, Tensor]) -> None:
        """Take in the rows `ids` that are new, with moments of zero and their value as their average."""
        new = ids[self._slots[ids] < 0]
        if not len(new):
            return
        old, rows = self.weight, self.table.detach()[new]
        self._slots[new] = torch.arange(len(new), device=new.device) + len(self.index)
        self.index, self.weight = torch.cat([self.index, new]), nn.Parameter(torch.cat([old.detach(), rows]))
        for group in optimizer.param_groups:
            group["params"] = [self.weight if p is old else p for p in group["params"]]
        optimizer.state[self.weight] = {
            name: torch.cat([moment, torch.zeros_like(rows, dtype=moment.dtype)]) if moment.ndim else moment
            for name, moment in optimizer.state.pop(old).items()
        }
        if NAME in average:
            average[NAME] = torch.cat([average[NAME], rows.to(average[NAME].dtype)])

    def take_gradient(self) -> None:
        """Move the table's gradient, whose rows are all here, to `weight`."""
        gradient, self.table.grad = self.table.grad, None
        self.weight.grad = torch.zeros_like(self.weight)
        if gradient is not None:
            self.weight.grad.index_copy_(0, self._slots[gradient.indices()[0]], gradient.values())

    @torch.no_grad()
    def write_back(self) -> None:
        """Put the updated rows into the table."""
        self.table.index_copy_(0, self.index, self.weight)

    @torch.no_grad()
    def read_again(self) -> None:
        """Follow a table and an index that were loaded in place."""
        self._slots.fill_(-1)
        self._slots[self.index] = torch.arange(len(self.index), device=self.index.device)
        self.weight.copy_(self.table[self.index])


def room_for_rows(tensors: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """What a state that kept `count` rows apart has in the place of the dense tensors, to load them into."""
    names = [name for name in tensors if name.endswith(f".{NAME}") and not name.startswith("weights.")]
    dense = {name: tensors[name] for name in names if tensors[name].ndim}
    apart = {name: torch.empty(count, t.shape[1], dtype=t.dtype, device=t.device) for name, t in dense.items()}
    return {"rows": torch.empty(count, dtype=torch.long), **apart}


@torch.no_grad()
def spread_rows(rows: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    """Fill the dense tensors: zero moments and the weights' own average where no row is."""
    for name, values in rows.items():
        if name != "rows":
            dense = tensors[name]
            dense.copy_(tensors[f"weights.{NAME}"]) if name.startswith("average.") else dense.zero_()
            complete = whole(dense)
            complete[rows["rows"].to(values.device)] = values
            fill(dense, complete)
