"""Graph networks by PyTorch Geometric."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks.models.job import Job, Learnt, Model, Results, Swap, load, seed


def _attentive_fp(swap: Swap) -> Job:
    geometric = load("torch_geometric.data")
    seed()
    molecules = []
    for i in range(64):  # rings with some cross bonds
        count = 12 + i % 13
        ends = torch.arange(count)
        bonds = torch.stack([ends, (ends + 1) % count])
        across = torch.stack([ends[::5], (ends[::5] + 3) % count])
        edges = torch.cat([bonds, bonds.flip(0), across, across.flip(0)], dim=1)
        molecules.append(
            geometric.Data(
                x=torch.randn(count, 39), edge_index=edges, edge_attr=torch.randn(edges.size(1), 10)
            )
        )
    batch = geometric.Batch.from_data_list(molecules)
    wanted = torch.randn(64, 1)

    def train() -> Results:
        seed()
        model = load("torch_geometric.nn").AttentiveFP(39, 200, 1, 10, 2, 2, dropout=0.2)
        swap(model)
        learnt = Learnt(model)
        optimizer = torch.optim.Adam(model.parameters(), lr=10**-2.5, weight_decay=1e-5)
        for _ in range(4):
            optimizer.zero_grad()
            out = model(batch.x, batch.edge_index, batch.edge_attr, batch.batch)
            loss = F.mse_loss(out, wanted)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return {"learnt": learnt(), "loss": loss.detach()}

    return train


MODELS = (
    Model(
        "AttentiveFP",
        {"torch_geometric": "torch-geometric"},
        "graph network of molecules, 4 steps of 64 graphs",
        "training",
        _attentive_fp,
    ),
)
