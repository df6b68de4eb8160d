"""`merge`: adapters of anyone into one."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from server.commands.console import console, counting, numbers_of, shown_score
from server.folders import refuse_existing


def merge(
    adapters: Annotated[list[Path], typer.Argument(help="PEFT folders of LoRA adapters.")],
    out: Annotated[Path, typer.Option("--out", help="The PEFT folder to write; must not exist.")],
    weights: Annotated[
        str, typer.Option(help="One an adapter, with commas; divided by their sum. Usually equal.")
    ] = "",
    rank: Annotated[int, typer.Option(help="Of the merged one; 0: the largest of any.")] = 0,
    alpha: Annotated[
        float, typer.Option(help="Of the merged one; 0: what keeps the first adapter's scale.")
    ] = 0.0,
    gauge: Annotated[
        str, typer.Option(help="How B and A share the singular values: balanced or lora.")
    ] = "balanced",
    any_base: Annotated[
        bool, typer.Option("--any-base", help="Merge though their base models have unlike names.")
    ] = False,
    without_heads: Annotated[
        bool, typer.Option("--without-heads", help="Drop heads and all else that is saved whole.")
    ] = False,
) -> None:
    """Average LoRA adapters from anywhere into one of rank R: their deltas, not their factors.

    One shot, without base model or data. Writes merge.json beside the adapter: how far the adapters
    agree, and what the rank keeps.

    Example: fedcopra merge adapter-a/ adapter-b/ adapter-c/ --weights 2,1,1 --out merged/
    """
    refuse_existing(out)  # before anything heavy is imported
    given = numbers_of("--weights", weights)
    from server.analysis.merging import MergeOptions, plan_merge, write_merged

    options = MergeOptions(given, rank, alpha, gauge, any_base, without_heads)
    plan = plan_merge(adapters, options)
    with counting(len(plan.ranks), "modules") as advance:
        numbers = write_merged(plan, out, advance)
    _print_merge(numbers)
    console.print(f"adapter: {out} (all numbers in merge.json beside it)", soft_wrap=True)


def _print_merge(numbers: Mapping[str, Any]) -> None:
    merged, alike = numbers["merged"], numbers["pairwise_cosine"]
    columns = ("", "weight", "rank", "alpha", "modules", "norm", "cosine", "stable rank")
    table = Table(*columns, box=None)
    for row in numbers["adapters"]:
        table.add_row(
            row["folder"],
            shown_score(row["weight"]),
            str(row["rank"]),
            f"{row['alpha']:g}",
            str(row["modules"]),
            shown_score(row["norm"]),
            shown_score(row["cosine_with_merged"]),
            shown_score(row["stable_rank"]),
        )
    shape = (str(merged["rank"]), f"{merged['alpha']:g}", str(merged["modules"]))
    table.add_row(
        "merged", "", *shape, shown_score(merged["norm"]), "", shown_score(merged["stable_rank"])
    )
    console.print(table)
    console.print(
        "(norm of the delta, cosine with the merged one, stable rank of a module on average)",
        soft_wrap=True,
    )
    # Of two adapters the least and the most alike pair are the same.
    pairs = alike if len(numbers["adapters"]) > 2 else dict(list(alike.items())[:1])
    for what, pair in pairs.items():
        label = f"{what} alike" if len(pairs) > 1 else "how alike"
        between = " and ".join(pair["between"])
        console.print(f"{label}: {between}, cosine {pair['cosine']:.3f}", soft_wrap=True)
    worst = merged["worst_module"]
    console.print(
        f"rank {merged['rank']} keeps {100 * merged['kept_energy']:.2f} % of the energy of the "
        f"average, in the worst module {100 * worst['kept_energy']:.2f} % ({worst['module']}); "
        f"rank {merged['rank_that_keeps_99_percent']} would keep 99 %",
        soft_wrap=True,
    )
    for group in numbers["held_by_some"]:
        console.print(
            f"{_some_of(group['names'])}: only in {', '.join(group['held_by'])}; zero elsewhere",
            soft_wrap=True,
        )
    for group in numbers["saved_whole"]:
        everyone = len(group["held_by"]) == len(numbers["adapters"])
        done = "dropped, of" if numbers["heads_dropped"] else "averaged over"
        holders = "all" if everyone else ", ".join(group["held_by"])
        console.print(f"{_some_of(group['names'])}: {done} {holders}", soft_wrap=True)


def _some_of(names: Sequence[str], most: int = 4) -> str:
    """Return the first names, and how many there are more."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
