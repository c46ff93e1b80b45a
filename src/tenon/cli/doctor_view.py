"""What the doctor found, on screen: the machine, the kernels, what to do.

This module does not know how it was found.
"""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tenon.runs.machine import GpuRecord, MachineRecord
from tenon.service.disk import DiskSpeed
from tenon.service.doctor import CheckResult, DoctorReport
from tenon.service.network import Link
from tenon.units import format_bytes, format_seconds

_STYLES = {"works": "green", "wrong": "bold red", "fails": "yellow", "unavailable": "yellow"}


def show_doctor(console: Console, report: DoctorReport) -> None:
    """The whole report."""
    table = Table.grid(padding=(0, 2))
    for name, value in (*_machine_rows(report.machine), *_surrounding_rows(report)):
        table.add_row(Text(name, "dim"), Text(value))
    console.print(table)
    if report.checks:
        console.print()
        console.print(_checks_table(report.checks))
        if absent := sum(check.state == "absent" for check in report.checks):
            console.print(Text(f"{absent} more need a GPU that torch can use; there is none", "dim"))
    console.print()
    if not report.advice:
        console.print(Text("nothing to do", "bold green"))
    for one in report.advice:
        word, style = ("needed", "bold red") if one.blocks else ("advice", "yellow")
        console.print(Text.assemble((f"{word}: ", style), one.what), soft_wrap=True)
        console.print(Text.assemble(("  do:   ", "dim"), (one.do, "bold")), soft_wrap=True)


def _machine_rows(machine: MachineRecord) -> list[tuple[str, str]]:
    packages = ", ".join(f"{name} {version}" for name, version in machine.packages.items())
    built = f"CUDA {machine.torch_cuda}" if machine.torch_cuda else "CPUs"
    cudnn = f", cuDNN {machine.cudnn}" if machine.cudnn else ""
    rows = [
        ("system", f"{machine.system}, Python {machine.python}, {machine.cores} cores"),
        ("packages", packages),
        ("torch", f"built for {built}{cudnn}" if "torch" in machine.packages else "not installed"),
        ("driver", f"{machine.driver}, speaks CUDA {machine.driver_cuda}" if machine.driver else "none"),
    ]
    rows += [(f"GPU {gpu.index}", _gpu_text(gpu)) for gpu in machine.gpus]
    return rows if machine.gpus else [*rows, ("GPU", f"none ({machine.no_gpu})" if machine.no_gpu else "none")]


def _gpu_text(gpu: GpuRecord) -> str:
    capability = f", capability {gpu.capability}" if gpu.capability else ""
    memory = f", {format_bytes(gpu.free_bytes)} of {format_bytes(gpu.total_bytes)} free" if gpu.total_bytes else ""
    return f"{gpu.name}{capability}{memory}"


def _surrounding_rows(report: DoctorReport) -> list[tuple[str, str]]:
    hub = "not asked" if report.hub is None else _link_text(report.hub)
    return [
        ("disk", _disk_text(report.disk)),
        ("loopback", _link_text(report.loopback)),
        ("hub", hub),
    ]


def _disk_text(disk: DiskSpeed) -> str:
    write, read = disk.write_bytes_per_second, disk.read_bytes_per_second
    speed = f"writes {format_bytes(write)}/s, reads {format_bytes(read)}/s" if write and read else disk.problem
    return f"{disk.folder}: {format_bytes(disk.free_bytes)} free, {speed}"


def _link_text(link: Link) -> str:
    if link.problem:
        return f"{link.target}: {link.problem}"
    rate = f"{format_bytes(link.bytes_per_second)}/s, " if link.bytes_per_second else ""
    return f"{link.target}: {rate}answers in {format_seconds(link.seconds or 0.0)}"


def _checks_table(checks: tuple[CheckResult, ...]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for head in ("kernel", "on", "", "error", "bound"):
        table.add_column(head, no_wrap=True)
    table.add_column("", overflow="fold")
    for check in checks:
        if check.state == "absent":
            continue
        error = "" if check.error is None else f"{check.error:.1e}"
        table.add_row(
            Text(check.name),
            Text("GPU" if check.device == "cuda" else "CPU", "dim"),
            Text(check.state, _STYLES[check.state]),
            Text(error),
            Text(f"{check.bound:.0e}", "dim"),
            Text(_note(check)),
        )
    return table


def _note(check: CheckResult) -> str:
    if check.state not in ("fails", "wrong", "unavailable"):
        return ""
    return "; ".join(part for part in (check.text, f"used instead: {check.instead}") if part)
