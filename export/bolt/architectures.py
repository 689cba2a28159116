"""GPUs that kernels are written for: the one list of them, and for estimates what they can do.

Numbers are of data sheets, and of what programs reach of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from keras_efficient.errors import UnknownName

__all__ = ["ARCHITECTURES", "Architecture", "architecture"]


@dataclass(frozen=True)
class Architecture:
    """A GPU of a compute capability: its largest one.

    Attributes:
        name: as compilers have it.
        device: whose numbers these are.
        processors: multiprocessors.
        clock: in Hz, under load.
        product_cycles: that a quarter of a multiprocessor takes for 16 × 8 × 16 in half precision, by `mma.sync`. On
            Hopper that instruction reaches 62 % of what `wgmma` does (an estimate from publications).
        group_cycles: the same by `wgmma`, if there is such an instruction: 80 % of the data sheet's rate, which
            libraries reach.
        shared_bytes: that blocks on a multiprocessor share, and one may take; a kilobyte more is reserved for each.
        shared_rate: bytes per cycle of a multiprocessor's shared memory.
        memory_rate: bytes per second of DRAM that copies reach.
        cache_rate: bytes per second that all multiprocessors get of the L2 cache (an estimate from publications).
        registers: of a multiprocessor.
        lanes: of a multiprocessor, that get an instruction on single numbers in a cycle.
        launch: seconds that a kernel in a graph takes though it does nothing (an estimate).
        barrier: cycles of a barrier of a block (an estimate).
        block_bytes: of shared memory that a block may take, if that is less than all.
    """

    name: str
    device: str
    processors: int
    clock: float
    product_cycles: float
    shared_bytes: int
    memory_rate: float
    cache_rate: float
    group_cycles: float | None = None
    shared_rate: int = 128
    registers: int = 65536
    lanes: int = 128
    launch: float = 2.5e-6
    barrier: int = 40
    block_bytes: int | None = None

    def holds(self, shared: int, blocks: int = 1) -> bool:
        """Whether so many blocks of a kernel have their shared memory on a multiprocessor at once."""
        fits = self.block_bytes is None or shared <= self.block_bytes
        return fits and (shared + 1024) * blocks <= self.shared_bytes + 1024

    def seconds(
        self,
        *,
        blocks: int,
        at_once: int,
        products: float,
        shared: float,
        memory: float,
        cache: float = 0.0,
        barriers: float = 0.0,
        product_cycles: float | None = None,
    ) -> float:
        """Of a kernel: what its blocks do on their multiprocessors in waves, or its traffic with memory.

        Args:
            blocks: of the grid.
            at_once: on a multiprocessor.
            products: of matrices, of one block.
            shared: bytes of shared memory that a block moves.
            memory: bytes of DRAM, all blocks together.
            cache: bytes of the L2 cache, all blocks together.
            barriers: in one block, one behind the other.
            product_cycles: of a product, if not the architecture's own.
        """
        waves, rest = divmod(blocks, self.processors * at_once)
        busy = max(products * (product_cycles or self.product_cycles) / 4, shared / self.shared_rate)
        # The last wave's multiprocessors have fewer blocks, if there are fewer.
        full = at_once * waves + -(-rest // self.processors)
        cycles = full * busy + (waves + (rest > 0)) * barriers * self.barrier
        return max(cycles / self.clock, memory / self.memory_rate, cache / self.cache_rate) + self.launch


_ALL = (
    Architecture("sm_80", "A100", 108, 1.41e9, 4.0 * 2, 163 << 10, 1.7e12, 4.5e12, lanes=64),
    Architecture("sm_86", "A10", 72, 1.7e9, 16.0, 99 << 10, 0.5e12, 2.0e12),
    Architecture("sm_89", "L40S", 142, 2.3e9, 16.0, 99 << 10, 0.75e12, 4.0e12),
    Architecture("sm_90a", "H200", 132, 1.755e9, 4.0 / 0.62, 227 << 10, 4.3e12, 6.5e12, 4.0 / 0.8),
)
ARCHITECTURES = {one.name: one for one in _ALL}


def architecture(name: str) -> Architecture:
    """By its name.

    Raises:
        UnknownName: no such name.
    """
    if name not in ARCHITECTURES:
        raise UnknownName("GPU architecture", name, ARCHITECTURES)
    return ARCHITECTURES[name]
