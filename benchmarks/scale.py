"""Throughput, joules a sample and memory of training on several GPUs, against one GPU and against back-propagation.

    torchrun --standalone --nproc-per-node 2 benchmarks/scale.py --json scale.json
    torchrun --standalone --nproc-per-node 2 benchmarks/scale.py --nets "" --sweep 1024x1024,2048x4096
    python benchmarks/scale.py --show results/scale/*.json
    torchrun --standalone --nproc-per-node 2 benchmarks/scale.py --device cpu --small --seconds 0.2     (a smoke test)

Arms, all with the same network, whole batch, precision and random images:

    one       the local rule on the first GPU, whole steps as CUDA graphs
    spread    the same rule on all GPUs: consecutive blocks ("mlp", "dgl", "man"), independent blocks ("noprop")
    bp        back-propagation on the first GPU, whole steps as CUDA graphs
    ddp       back-propagation, a part of the batch on each GPU (DistributedDataParallel)
    1f1b      back-propagation, consecutive blocks on each GPU (torch.distributed.pipelining, Schedule1F1B)

Steps are repeated for --seconds after warm-up; the slowest rank's time counts, and the joules of the GPUs that
take part. "same weights" compares "spread" with "one" after the same steps from the same start: equal bits, and how far
norms differ.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
from step import IMAGE, random_images
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import convert_conv2d_weight_memory_format

from bpfree import build_network
from bpfree.algorithms import Learner, algorithm
from bpfree.data.batches import Batches
from bpfree.energy import EnergyMeter, choose_source
from bpfree.experiments.records import environment
from bpfree.experiments.run import peak_memory, preferred_layout
from bpfree.experiments.stepper import Stepper, numerics, step_precision
from bpfree.experiments.tables import markdown_table, text_table
from bpfree.networks.blocks import block_output_shapes
from bpfree.networks.heads import Head
from bpfree.networks.partition import balanced_ends, partition, step_seconds
from bpfree.parallel import Alone, Ranks, Spread, Team, spread_over

DATASET: Final = "cifar10"  # whose shape the random images have
CLASSES: Final = 10
SEED: Final = 0
WARM_CHUNKS: Final = 2


@dataclass(frozen=True)
class Case:
    """A network, the rule that trains it, and how.

    Attributes:
        name: of the case.
        rule: the local rule.
        network: name of the network.
        options: of the rule.
        form: how the rule is spread.
        batch: whole batch.
        precision: as for the fit loop.
        blocks: K, into which back-propagation's network is cut for 1F1B; 0 for the units it has.
    """

    name: str
    rule: str
    network: str
    options: dict[str, Any]
    form: str
    batch: int
    precision: str
    blocks: int = 0


def cases(arguments: argparse.Namespace) -> list[Case]:
    """What is to be measured."""
    small = arguments.small
    depth, width, batch = arguments.depth, arguments.width, arguments.batch
    residual, blocks, images = ("resnet:20", 4, 32) if small else ("resnet:110", 32, 1024)
    local = {"k": blocks, "lr": 0.01}
    known = {
        "mlp": Case("mlp", "mf", f"mlp:{depth}x{width}", {"lr": 1e-4}, "layer", batch, "bf16"),
        "noprop": Case(
            "noprop", "noprop", "mlp:1x32" if small else "noprop:dt", {"variant": "dt"}, "block", 128, "tf32"
        ),
        "dgl": Case("dgl", "dgl", residual, local, "layer", images, "tf32", blocks),
        "man": Case("man", "man", residual, local, "layer", images, "tf32", blocks),
    }
    chosen = [known[name] for name in arguments.nets.split(",") if name]
    for size in filter(None, arguments.sweep.split(",")):
        w, b = size.split("x")
        chosen.append(Case(f"sweep {size}", "mf", f"mlp:{depth}x{w}", {"lr": 1e-4}, "layer", int(b), "bf16"))
    return chosen


class Bench:
    """Measures arms on the processes that are there.

    Args:
        ranks: the processes.
        arguments: of the command line.
    """

    def __init__(self, ranks: Ranks, arguments: argparse.Namespace) -> None:
        self.ranks, self.arguments, self.device = ranks, arguments, ranks.device
        self._network: tuple[str, nn.Sequential] | None = None

    def network(self, name: str) -> nn.Sequential:
        """The network on the host, the same on all ranks, drawn on the device, which is quicker."""
        if self._network is None or self._network[0] != name:
            torch.manual_seed(SEED)
            with self.device:
                made = build_network(name, IMAGE)
            self._network = name, made.cpu()
        return copy.deepcopy(self._network[1])

    def data(self, case: Case, layout: torch.memory_format) -> Batches:
        images = random_images(case.batch * self.arguments.staged, self.device)
        images.layout = layout
        return images

    def local(self, case: Case, arm: str) -> dict[str, Any] | None:
        """The local rule on one GPU or on all; the measurement on rank 0."""
        alone = arm == "one"
        if alone and self.ranks.rank:
            return None
        network = self.network(case.network)
        layout = preferred_layout(network, self.device)
        torch.manual_seed(SEED)
        learner = algorithm(case.rule).build(network, CLASSES, IMAGE, **case.options)
        convert_conv2d_weight_memory_format(learner, layout)
        data = self.data(case, layout)
        team: Team = Alone()
        with numerics(case.precision):
            if alone:
                learner.to(self.device)
            else:
                sample = next(iter(data.in_order(case.batch)))
                with step_precision(case.precision, self.device):
                    team = spread_over(
                        self.ranks, Spread(case.form), learner, sample, batch_size=case.batch, graphs=True
                    )
            found = self._stepped(case, learner, data, team)
        return {**found, **team.describe()}

    def backprop(self, case: Case) -> dict[str, Any] | None:
        """Back-propagation on one GPU."""
        if self.ranks.rank:
            return None
        network = self.network(case.network)
        layout = preferred_layout(network, self.device)
        learner = algorithm("bp").build(network, CLASSES, IMAGE, lr=1e-4).to(self.device)
        convert_conv2d_weight_memory_format(learner, layout)
        with numerics(case.precision):
            return self._stepped(case, learner, self.data(case, layout), Alone())

    def _stepped(self, case: Case, learner: Learner, data: Batches, team: Team) -> dict[str, Any]:
        stage = team.stages(learner)[0]
        stepper = Stepper(
            learner,
            stage,
            data,
            live_prefix=None,
            batch_size=case.batch,
            precision=case.precision,
            scheduled=False,
            graph=True,
            team=team,
        )
        draw = data.draw(SEED)
        self._reset_peak()
        stepper.rehearse(draw)
        stepper.stage_batches(draw, 0, stepper.capacity, [1.0] * stepper.capacity)
        stepper.run(stepper.capacity, lambda: False)
        digest = self._digest(learner, team)
        result = self._timed(
            lambda: stepper.run(stepper.capacity, lambda: False), stepper.capacity, case.batch, team.size
        )
        stepper.close()
        mode = "graph" if stepper.use_graph or team.captures else "eager"
        return {**result, "mode": mode, "digest": digest}

    def _digest(self, learner: Learner, team: Team) -> list[tuple[int, float]]:
        """Of each trained parameter the sum of its bits and its norm; none for those of other ranks."""
        own = []
        for index, parameter in enumerate(learner.parameters()):
            if parameter.requires_grad:
                bits = parameter.detach().contiguous().view(torch.int32).sum(dtype=torch.int64)
                own.append((index, int(bits), float(parameter.detach().double().norm())))
        parts = self.ranks.of_all(own) if team.size > 1 else [own]
        known = {index: (bits, norm) for part in reversed(parts) for index, bits, norm in part}  # some are everyone's
        return [known[index] for index in sorted(known)]

    def ddp(self, case: Case) -> dict[str, Any]:
        """Back-propagation on a part of the batch on each GPU."""
        network = self.network(case.network)
        layout = preferred_layout(network, self.device)
        module = nn.Sequential(*network, self._head(network)).to(self.device)
        convert_conv2d_weight_memory_format(module, layout)
        places = [self.device.index] if self.device.type == "cuda" else None
        spread = DistributedDataParallel(module, device_ids=places, process_group=self.ranks.everyone)
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)
        share = case.batch // self.ranks.size
        part = slice(self.ranks.rank * share, (self.ranks.rank + 1) * share)
        batches = [(x[part], y[part]) for x, y in self.data(case, layout).in_order(case.batch)]

        def chunk() -> None:
            for x, y in batches:
                with step_precision(case.precision, self.device):
                    loss = F.cross_entropy(spread(x), y)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()

        self._reset_peak()
        with numerics(case.precision):
            return {**self._timed(chunk, len(batches), share * self.ranks.size, self.ranks.size), "mode": "eager"}

    def one_f_one_b(self, case: Case) -> dict[str, Any]:
        """Back-propagation with consecutive blocks on each GPU."""
        from torch.distributed.pipelining import PipelineStage, Schedule1F1B

        network = self.network(case.network)
        layout = preferred_layout(network, self.device)
        whole = partition(network, case.blocks, input_shape=IMAGE) if case.blocks else network
        convert_conv2d_weight_memory_format(whole, layout)
        data = self.data(case, layout)
        micro = self.arguments.microbatches * self.ranks.size
        inputs, _ = next(iter(data.in_order(max(1, case.batch // micro))))
        costs = step_seconds(list(whole), inputs) if self.ranks.rank == 0 else None
        ends = balanced_ends(self.ranks.from_leader(costs), self.ranks.size)
        first = [0, *(end + 1 for end in ends)]
        blocks = list(whole)[first[self.ranks.rank] : first[self.ranks.rank + 1]]
        last = self.ranks.rank == self.ranks.size - 1
        module = Cast(nn.Sequential(*blocks, *([self._head(network)] if last else [])), case.precision).to(self.device)
        convert_conv2d_weight_memory_format(module, layout)
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)
        stage = PipelineStage(module, self.ranks.rank, self.ranks.size, self.device, group=self.ranks.everyone)
        schedule = Schedule1F1B(stage, micro, loss_fn=lambda scores, y: F.cross_entropy(scores.float(), y))
        batches = list(data.in_order(case.batch))

        def chunk() -> None:
            for x, y in batches:
                optimizer.zero_grad(set_to_none=True)
                if self.ranks.rank == 0 and last:
                    schedule.step(x, target=y)
                elif self.ranks.rank == 0:
                    schedule.step(x)
                elif last:
                    schedule.step(target=y)
                else:
                    schedule.step()
                optimizer.step()

        self._reset_peak()
        with numerics(case.precision):
            result = self._timed(chunk, len(batches), case.batch, self.ranks.size)
        return {**result, "mode": "eager", "microbatches": micro, "last_units": list(ends)}

    @staticmethod
    def _head(network: nn.Sequential) -> Head:
        torch.manual_seed(SEED)
        return Head(block_output_shapes(list(network), IMAGE)[-1], CLASSES, pool="flatten", bias=True)

    # -- measuring --------------------------------------------------------------------------------------------

    def _reset_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _timed(self, chunk: Callable[[], Any], steps: int, batch: int, ranks: int) -> dict[str, Any]:
        """Repeat a chunk of steps on the ranks that take part; samples a second, joules a sample, memory by rank."""
        for _ in range(WARM_CHUNKS):
            chunk()
        self._wait()
        started = time.perf_counter()
        chunk()
        self._wait()
        once = time.perf_counter() - started
        together = ranks > 1
        repeats = max(2, round(self.arguments.seconds / max(once, 1e-9)))
        repeats = self.ranks.from_leader(repeats) if together else repeats
        source = choose_source(self.arguments.energy, self.device)
        meter = EnergyMeter(source, device=self.device, min_window_s=0.1)
        if together:
            self.ranks.of_all(None)
        with meter.window("steps") as window:
            started = time.perf_counter()
            for _ in range(repeats):
                chunk()
            self._wait()
            seconds = time.perf_counter() - started
        source.close()
        own: dict[str, Any] = {
            "seconds": seconds,
            "energy": window.result.as_dict(),
            "memory": peak_memory(self.device),
        }
        by_rank = self.ranks.of_all(own) if together else [own]
        slowest = max(rank["seconds"] for rank in by_rank)
        joules = [rank["energy"]["gross_j"] for rank in by_rank]
        samples = repeats * steps * batch
        return {
            "samples_per_s": samples / slowest,
            "step_seconds": slowest / (repeats * steps),
            "steps": repeats * steps,
            "j_per_sample": None if None in joules else sum(joules) / samples,
            "peak_mib": [rank["memory"]["peak_mib"] for rank in by_rank],
            "by_rank": by_rank,
        }


class Cast(nn.Module):
    """A part of a network under autocast, which 1F1B does not enter by itself.

    Args:
        module: the part.
        precision: as for the fit loop.
    """

    def __init__(self, module: nn.Module, precision: str) -> None:
        super().__init__()
        self.module, self.precision = module, precision

    def forward(self, inputs: Tensor) -> Tensor:
        with step_precision(self.precision, inputs.device):
            outputs: Tensor = self.module(inputs)
            return outputs


def compare(one: list[tuple[int, float]], spread: list[tuple[int, float]]) -> dict[str, Any]:
    """Whether two digests are of the same weights."""
    pairs = list(zip(one, spread, strict=True))
    return {
        "equal_bits": all(a[0] == b[0] for a, b in pairs),
        "parameters_equal": sum(a[0] == b[0] for a, b in pairs),
        "parameters": len(pairs),
        "largest_relative_norm_difference": max(abs(a[1] - b[1]) / max(a[1], 1e-30) for a, b in pairs),
    }


def as_measured(case: Case, arm: str, ranks: int) -> dict[str, Any]:
    """What `bpfree plan --compare` needs to know of an arm, beside the seconds of its step."""
    forms = {"one": "one-process", "bp": "one-process", "spread": case.form, "ddp": "data", "1f1b": "1f1b"}
    return {
        "form": forms[arm],
        "ranks": 1 if forms[arm] == "one-process" else ranks,
        "batch_size": case.batch // ranks if arm == "ddp" else case.batch,
        "algo": case.rule if arm in {"one", "spread"} else "bp",
        "network": case.network,
        "dataset": DATASET,
        "precision": case.precision,
    }


def measure(bench: Bench, case: Case, arms: list[str], record: dict[str, Any]) -> None:
    """All arms of a case, added to the record as they come."""
    how: dict[str, Callable[[], dict[str, Any] | None]] = {
        "one": lambda: bench.local(case, "one"),
        "spread": lambda: bench.local(case, "spread"),
        "bp": lambda: bench.backprop(case),
        "ddp": lambda: bench.ddp(case),
        "1f1b": lambda: bench.one_f_one_b(case),
    }
    digests = {}
    for arm in arms:
        started = time.perf_counter()
        found = how[arm]()
        gc.collect()  # graphs and optimisers refer to each other in cycles
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
        bench.ranks.of_all(None)  # those that had no part wait here
        if found is not None and bench.ranks.rank == 0:
            digests[arm] = found.pop("digest", None)
            row = {
                "case": vars(case),
                "arm": arm,
                **found,
                **as_measured(case, arm, bench.ranks.size),
                "whole_s": time.perf_counter() - started,
            }
            if arm == "spread" and digests.get("one"):
                row["same_weights"] = compare(digests["one"], digests["spread"])
            record["arms"].append(row)
            print(
                f"{case.name} {arm}: {row['samples_per_s']:.0f} samples/s, {1e3 * row['step_seconds']:.2f} ms a step",
                flush=True,
            )
            if bench.arguments.json:
                bench.arguments.json.write_text(json.dumps(record, indent=1) + "\n")


def rows_of(found: list[dict[str, Any]]) -> list[dict[str, str]]:
    """The arms of some records, for a table."""
    arms = [(row, record["environment"]) for record in found for row in record["arms"]]
    single = {row["case"]["name"]: row["samples_per_s"] for row, _ in arms if row["arm"] == "one"}
    rows = []
    for row, described in arms:
        name, joules = row["case"]["name"], row["j_per_sample"]
        base, same = single.get(name), row.get("same_weights")
        rows.append(
            {
                "case": f"{name} ({row['case']['network']}, {row['case']['batch']}, {row['case']['precision']})",
                "arm": row["arm"],
                "samples/s": f"{row['samples_per_s']:.0f}",
                "of one": "" if base is None else f"{row['samples_per_s'] / base:.2f}",
                "step, ms": f"{1e3 * row['step_seconds']:.2f}",
                "mJ/sample": "not measured" if joules is None else f"{1e3 * joules:.3g}",
                "peak MiB by rank": ", ".join(f"{mib:.0f}" for mib in row["peak_mib"]),
                "mode": row["mode"],
                "same weights": "" if same is None else f"{same['parameters_equal']} of {same['parameters']}",
                "hardware": described["hardware"],
                "date": described["date"][:10],
            }
        )
    return rows


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--nets", default="mlp,noprop,dgl,man", help="cases, of mlp, noprop, dgl, man")
    parser.add_argument("--arms", default="one,spread,bp,ddp,1f1b", help="arms of these cases")
    parser.add_argument("--sweep", default="", help="MLPs as WIDTHxBATCH,..: arms one and spread only")
    parser.add_argument("--depth", type=int, default=16, help="hidden layers of the MLP")
    parser.add_argument("--width", type=int, default=8192, help="units of each")
    parser.add_argument("--batch", type=int, default=4096, help="whole batch of the MLP")
    parser.add_argument("--microbatches", type=int, default=4, help="of 1F1B, for each rank")
    parser.add_argument("--staged", type=int, default=4, help="batches on the device, one chunk of steps")
    parser.add_argument("--seconds", type=float, default=3.0, help="how long each arm is measured")
    parser.add_argument("--small", action="store_true", help="small networks, for a smoke test")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--energy", default="auto", help="where joules come from")
    parser.add_argument("--json", type=Path, help="where the record goes")
    parser.add_argument("--show", type=Path, nargs="+", help="only print the table of such records, as Markdown")
    arguments = parser.parse_args()
    if arguments.small:
        arguments.depth, arguments.width, arguments.batch = min(arguments.depth, 4), 64, 64
    return arguments


def main() -> None:
    arguments = parse()
    if arguments.show:
        print(markdown_table(rows_of([json.loads(path.read_text()) for path in arguments.show])))
        return
    # where the record was put is nobody's business
    given = [word for word in sys.argv[1:] if not word.startswith("--json=")]
    if "--json" in given:
        place = given.index("--json")
        given = [*given[:place], *given[place + 2 :]]
    ranks = Ranks(arguments.device)
    bench = Bench(ranks, arguments)
    record = {
        "environment": environment(ranks.device, ranks.size),
        "seed": SEED,
        "command": shlex.join(["torchrun", "--nproc-per-node", str(ranks.size), "benchmarks/scale.py", *given]),
        "arms": [],
    }
    for case in cases(arguments):
        arms = ["one", "spread"] if case.name.startswith("sweep") else arguments.arms.split(",")
        # back-propagation through MAN's network is that of DGL's; NoProp's blocks have no network that it could cut
        without = {"man": {"bp", "ddp", "1f1b"}, "noprop": {"bp", "ddp", "1f1b"}}.get(case.name, set())
        measure(bench, case, [arm for arm in arms if arm not in without], record)
    if ranks.rank == 0:
        print(text_table(rows_of([record])))
    ranks.leave()


if __name__ == "__main__":
    main()
