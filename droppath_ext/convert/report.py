"""What convert() did, a row for each call of a drop path."""

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .runtime import MISSED


@dataclass
class ConvertedSite:
    """One call of a drop path: in which module it stands, what was done with it, and why not more."""

    path: str  # of the drop path in the model
    block: str  # path of the module whose forward calls it
    block_class: str
    drop_prob: float
    level: str  # "keep", "fuse" or "skip"; "none" if the drop path is left as it is
    why: str = ""
    module: nn.Module | None = field(default=None, repr=False, compare=False)

    @property
    def missed(self) -> int:
        """Training calls of the block whose arguments were not those of its plan: the original ran."""
        return 0 if self.module is None else int(self.module.__dict__.get(MISSED, 0))


@dataclass
class ConversionReport:
    """What ``convert`` did. Prints as a table; ``sites`` is for programs."""

    residual: str
    sites: list[ConvertedSite] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    is_planned: bool = True  # False until the first training call, where there was no example

    def count(self, level: str) -> int:
        """How many sites are at this level."""
        return sum(site.level == level for site in self.sites)

    def __str__(self) -> str:
        rows: dict[tuple[Any, ...], list[ConvertedSite]] = {}
        for site in self.sites:
            rows.setdefault((site.block_class, site.level, site.why), []).append(site)
        table = [("block", "sites", "drop_prob", "done", "why not more")]
        for (block, level, why), sites in rows.items():
            rates = sorted({site.drop_prob for site in sites})
            span = f"{rates[0]:.3g}" if len(rates) == 1 else f"{rates[0]:.3g} to {rates[-1]:.3g}"
            table.append((f"{sites[0].block} ({block})", str(len(sites)), span, level, why))
        widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table
        ]
        totals = ", ".join(
            f"{self.count(level)} {level}" for level in ("skip", "fuse", "keep", "none") if self.count(level)
        )
        missed = sum({id(site.module): site.missed for site in self.sites}.values())
        notes = [*self.notes]
        if missed:
            notes.append(f"{missed} training calls had other arguments than were planned for, and ran as before")
        state = "" if self.is_planned else ", to be planned in the first training call"
        return "\n".join([f"convert to {self.residual}: {totals or 'no calls of drop paths'}{state}", *lines, *notes])
