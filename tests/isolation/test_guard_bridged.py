"""The spoof matrix of bridged taps: every kind of frame, to the host, another tap and the wire."""

from collections import Counter

import pytest
from guard_cast import LAN, STRICT
from guard_kinds import KINDS
from guard_scene import standing
from guard_tally import row

from netplan.counters import read_counters


def send_everywhere(scene, kind, mode, row):
    """Send a kind to each destination and note what came of it; without a mode nobody guards."""
    cast = scene.cast()
    fine = mode in kind.passes
    for where, end in scene.ends().items():
        hits = scene.hits(kind, cast, end)
        row.cells += 1
        if kind.unforwarded:
            row.never += 1
            if hits:
                row.wrong.append(f"{kind.name} to the {where}: a bridge does send it on, to the {hits}")
        elif fine or (not mode and kind.passes):
            row.fine += 1
            row.fine_seen += where in hits
        else:
            row.hostile += 1
            row.hostile_seen += bool(hits)
        if fine and where not in hits:
            row.wrong.append(f"{kind.name} to the {where}: not seen there")
        if mode and not fine and hits:
            row.wrong.append(f"{kind.name} to the {where}: seen at the {hits}")
        if not mode and not kind.unforwarded and where not in hits:
            row.wrong.append(f"{kind.name} to the {where}: not seen there although nobody guards")


@pytest.mark.parametrize("mode", [STRICT, LAN, None])
def test_every_kind_of_frame(mode, request):
    result = row(request.config, f"bridged, {mode or 'off'}")
    with standing() as scene:
        scene.converge(scene.desired(strict=mode == STRICT, guarded=bool(mode)))
        scene.open()
        scene.introduce()
        for kind in KINDS:
            result.kinds += 1
            send_everywhere(scene, kind, mode, result)
        refused = Counter()
        for one in read_counters().refused:
            refused[one.tap] += one.packets
    assert not result.wrong, "\n".join(result.wrong)
    # the other tap sent nothing that is refused
    assert refused == ({"slaptap0": result.hostile + counted_although_unforwarded()} if mode else {})


def counted_although_unforwarded():
    """Frames that a bridge would keep, and that are refused before; it drops the others itself."""
    return 3 * sum(kind.name in {"LACP", "LLDP"} for kind in KINDS)
