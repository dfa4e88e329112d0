"""Device models by their ports, as a guest reaches them."""

from __future__ import annotations

from mixvisor.vm.disks.geometry import geometry_of
from mixvisor.vm.worker.devices.cmos import Cmos
from mixvisor.vm.worker.devices.pic import Interrupts
from mixvisor.vm.worker.devices.timer import Timer


class Ports:
    def __init__(self, device):
        self.table = {port: (read, write) for port, read, write in device.ports()}

    def read(self, port):
        value = self.table[port][0]()
        assert 0 <= value <= 0xFF
        return value

    def write(self, port, *values):
        for value in values:
            self.table[port][1](value)


def timer(clock, interrupts=None, lost=None):
    return Timer(clock, interrupts or Interrupts(lambda _asking: None, firmware=True),
                 changed=lambda: None, lost=lost or (lambda _n: None))


def cmos(clock, interrupts=None, changed=lambda: None):
    return Cmos(clock, 64 << 20, {0: geometry_of(1474560)},
                interrupts or Interrupts(lambda _asking: None, firmware=True), changed)
