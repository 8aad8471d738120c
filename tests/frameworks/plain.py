"""A loop in plain torch, with a `WeightAverage` of its own: the kit's first framework."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from swafast.integrations.weight_average import Contract, refuse_second
from tests.frameworks.kit import BATCH, EvaluationError, Framework, Job, Net, Report, State, optimizer_of, whole_state

FILE = "checkpoint.pt"


class WeightAverage(Contract):
    """The contract, as it is."""


class Plain(Framework):
    def train(self, job: Job) -> Report:
        net = job.net()
        optimizer = optimizer_of(net.parameters())
        averages = [WeightAverage(**job.options) for _ in range(job.installed)]
        refuse_second(averages, "the loop")
        average = next(iter(averages), None)
        if average is not None:
            average.make(net)
            average.follow([optimizer], net, step=job.before)
        if job.resumes is not None:
            saved = torch.load(job.resumes / FILE, weights_only=True)
            net.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            if average is not None:
                average.resume(saved.get("swafast"), job.resumes)
        try:
            for _ in range(job.before, job.steps, 4):
                self.epoch(job, net, optimizer)
                self.evaluate(job, net, average)
                self.save(job.folder, net, optimizer, average)
        except EvaluationError:
            self.save(job.folder, net, optimizer, average)
        saved_model: State = torch.load(job.folder / FILE, weights_only=True)["model"]
        if average is None:
            return Report(whole_state(net))
        with average.swapped(net):
            exported = whole_state(net)
        average.finish(net)
        assert average.attachment is not None
        return Report(
            whole_state(net), average.averaged.state_dict(), average.attachment.state_dict(), exported, saved_model
        )

    def epoch(self, job: Job, net: Net, optimizer: torch.optim.Optimizer) -> None:
        net.train()
        for number, (inputs, classes) in enumerate(DataLoader(TensorDataset(*job.train_set()), BATCH)):
            (cross_entropy(net(inputs), classes) / job.accumulation).backward()
            if (number + 1) % job.accumulation == 0:
                optimizer.step()
                optimizer.zero_grad()

    def evaluate(self, job: Job, net: Net, average: WeightAverage | None) -> None:
        net.eval()
        if average is not None:
            average.swap_in(net)
        try:
            for index in range(job.eval_sets):
                for inputs, _ in DataLoader(TensorDataset(*job.eval_set(index)), BATCH):
                    with torch.no_grad():
                        net(inputs)
        finally:
            if average is not None:
                average.swap_out()

    def save(self, folder: Path, net: Net, optimizer: torch.optim.Optimizer, average: WeightAverage | None) -> None:
        state = {"model": net.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(state | ({} if average is None else {"swafast": average.state()}), folder / FILE)

    def halve(self, folder: Path) -> None:
        saved = torch.load(folder / FILE, weights_only=True)
        del saved["swafast"]["attachment"]
        torch.save(saved, folder / FILE)
