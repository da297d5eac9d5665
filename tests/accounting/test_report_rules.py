"""What becomes of a tenant's claims, and what a document must be: held against the strict master's own judgement."""

from decimal import Decimal

import pytest
import strict_master
from hostile_usage import COUNT, TENANT, good_files, hostile_files
from hypothesis import given, settings
from hypothesis import strategies as st

from accounting.errors import AccountingError
from accounting.rules import accept, problems
from accounting.tioxml import (
    LARGEST,
    MOST_MOVEMENTS,
    MOST_TEXT,
    Claim,
    Document,
    Movement,
    read,
    read_consumption,
    write,
)

DAY = 1795219200.0  # 2026-11-21 00:00:00 UTC
NOW = DAY + 100_000
RESOURCES = frozenset(TENANT.resources)
OWN = frozenset({TENANT.partition})


@pytest.fixture(scope="module")
def schemas():
    made = strict_master.Schemas()
    yield made
    made.close()


def about(*movements, reference="2026-11-21-slappart7"):
    return Document(reference, "Usage", DAY, DAY + 86399, movements)


def good_movement(**values):
    return Movement(**{"resource": "cpu", "reference": TENANT.guid, "quantity": Decimal("2.5")} | values)


def judged(document, **more):
    given_ = {"references": {TENANT.guid, "COMP-1"}, "resources": RESOURCES, "now": NOW}
    return problems(document, **given_ | more)


def accepted(claims):
    return accept(claims, guid=TENANT.guid, own_names=OWN, resources=RESOURCES)


def refused(*claims, **more):
    with pytest.raises(AccountingError) as caught:
        accept(claims, **{"guid": TENANT.guid, "own_names": OWN, "resources": RESOURCES} | more)
    assert caught.value.code == "accounting.report"
    assert len(caught.value.message) < 1000
    return caught.value.message


# --- documents


def test_a_good_document_has_no_problem():
    assert judged(about(good_movement(), good_movement(reference="COMP-1", quantity=Decimal(-1)))) == ()


@pytest.mark.parametrize(
    ("document", "said"),
    [
        (about(), "no movement"),
        (about(good_movement(resource="gold")), "resource 'gold'"),
        (about(good_movement(resource="")), "resource ''"),
        (about(good_movement(reference="SOFTINST-8")), "'SOFTINST-8' is no instance"),
        (about(good_movement(reference="")), "'' is no instance"),
        (about(good_movement(quantity=Decimal(0))), "quantity 0"),
        (about(good_movement(quantity=Decimal("-0.0"))), "quantity -0.0"),
        (about(good_movement(quantity=Decimal("NaN"))), "quantity NaN"),
        (about(good_movement(quantity=Decimal("sNaN"))), "quantity sNaN"),
        (about(good_movement(quantity=Decimal("-Infinity"))), "quantity -Infinity"),
        (about(good_movement(price=Decimal("NaN"))), "price NaN"),
        (about(good_movement(), reference=""), "reference ''"),
        (about(good_movement(), reference="a b"), "reference 'a b'"),
        (about(good_movement(), reference="-a"), "reference '-a'"),
        (about(good_movement(), reference="a\n"), "reference 'a"),
        (about(good_movement(), reference="caf\xe9"), "reference 'caf"),
        (about(good_movement(), reference="x" * 200), "reference 'xxx"),
        (about(good_movement(), reference="used"), "'used' was used before"),
        (Document("a", "", DAY, DAY - 1, (good_movement(),)), "does not start before it stops"),
        (Document("a", "", DAY, NOW + 1, (good_movement(),)), "stops after"),
        (Document("a", "", DAY, float("nan"), (good_movement(),)), "not finite"),
        (Document("a", "", float("-inf"), DAY, (good_movement(),)), "not finite"),
    ],
)
def test_what_a_master_would_reject_is_a_problem(document, said):
    (problem,) = judged(document, known=frozenset({"used"}))
    assert said in problem


def test_the_master_is_no_stricter_than_the_rules(schemas):
    """Each document that has no problem here passes the strict master, and the other way round."""
    books = strict_master.Books("COMP-1", [TENANT.guid], sorted(RESOURCES))
    fields = {
        "resource": ["cpu", "gold", ""],
        "reference": [TENANT.guid, "COMP-1", TENANT.foreign, ""],
        "quantity": [Decimal(1), Decimal("1e-9"), Decimal(0), Decimal(-3)],
        "title": ["t", "<&>\0é"],
    }
    for name, values in fields.items():
        for value in values:
            document = about(good_movement(**{name: value}))
            text = write(document)
            assert schemas.problem("computer", text.encode()) is None
            violations = books.judge(text, NOW)[-1]
            assert bool(violations) == bool(judged(document)), (name, value, violations)
    assert schemas.problem("computer", write(about()).encode())
    assert judged(about())


def test_problems_are_told_in_bounds():
    assert len(judged(about(*[good_movement(resource="gold")] * 5000))) == 20


# --- claims


@pytest.mark.parametrize("reference", ["", TENANT.guid, TENANT.partition])
def test_a_tenant_reports_about_itself(reference):
    claim = Claim("cpu", " two\nwords\0", reference, Decimal("1.5"))
    expected = Movement("cpu", TENANT.guid, Decimal("1.5"), "two words\ufffd")
    assert accepted([claim]) == (expected,)


def test_claims_of_one_resource_and_title_are_added_up():
    claims = [
        Claim("cpu", "a", "", Decimal("0.1")),
        Claim("disk", "a", "", Decimal(5)),
        Claim("cpu", "a ", TENANT.partition, Decimal("0.2")),
        Claim("cpu", "b", "", Decimal(1)),
    ]
    found = [(movement.resource, movement.title, movement.quantity) for movement in accepted(claims)]
    assert found == [("cpu", "a", Decimal("0.3")), ("disk", "a", Decimal(5)), ("cpu", "b", Decimal(1))]


def test_no_claims_are_no_movements():
    assert accepted([]) == ()


def test_one_foreign_claim_refuses_all():
    good = Claim("cpu", "", "", Decimal(1))
    foreign = Claim("cpu", "", TENANT.foreign, Decimal(1))
    assert refused(good, foreign) == "reports about 'SOFTINST-8'; a partition reports only about itself"
    assert len(refused(Claim("cpu", "", "\x1b" * 10_000, Decimal(1)))) < 400


def test_a_resource_that_is_not_allowed_is_told_with_those_that_are():
    gold = Claim("gold", "", "", Decimal(1))
    assert refused(gold) == "resource 'gold' is not one of 'cpu', 'disk', 'requests'"
    assert "there are none" in refused(gold, resources=frozenset())
    many = frozenset(f"r{number:03d}" for number in range(500))
    assert "'r009' and 490 more" in refused(gold, resources=many)


def test_sums_are_bounded():
    assert accepted([Claim("cpu", "", "", LARGEST)])[0].quantity == LARGEST
    assert "add up" in refused(Claim("cpu", "", "", LARGEST), Claim("cpu", "", "", Decimal("1e-9")))


# --- the files


def taken_of(content):
    """Give the movements of a file, or the error."""
    try:
        return accepted(read_consumption(content))
    except AccountingError as error:
        return error


def check(content):
    """Give the movements of a file, or the error, after looking at all that is promised about them."""
    movements = taken_of(content)
    if isinstance(movements, AccountingError):
        assert movements.code == "accounting.report"
        assert movements.hint
        assert not movements.retryable
        assert movements.message.isprintable()
        assert len(movements.message) < 1000
        return movements
    assert len(movements) <= MOST_MOVEMENTS
    for movement in movements:
        assert movement.reference == TENANT.guid
        assert movement.resource in RESOURCES
        assert Decimal("1e-9") <= movement.quantity <= LARGEST
        assert movement.price == 0
        assert len(movement.title) <= MOST_TEXT
        assert movement.title.isprintable() or not movement.title.isascii()
    if movements:
        document = about(*movements)
        assert judged(document) == ()
        assert read(write(document)) == document
    return movements


def test_good_files_are_taken():
    for name, content, quantities in good_files():
        movements = check(content)
        assert not isinstance(movements, AccountingError), (name, movements)
        assert {(found.resource, found.title): found.quantity for found in movements} == quantities, name


def test_a_thousand_hostile_files(schemas):
    """Each is refused, or what is taken of it is the tenant's own and passes the master's schema and rules."""
    books = strict_master.Books("COMP-1", [TENANT.guid], sorted(RESOURCES))
    names, taken = set(), 0
    for name, content, why in hostile_files():
        names.add(name)
        found = check(content)
        if isinstance(found, AccountingError):
            continue
        assert not name.startswith("refuse-"), (name, why, found)
        assert schemas.problem("partition", content) is None, (name, why)
        if found:
            taken += 1
            text = write(about(*found))
            assert schemas.problem("computer", text.encode()) is None, (name, why)
            assert books.judge(text, NOW)[-1] == (), (name, why)
    assert len(names) == COUNT == 1000
    assert taken > 20  # else nothing was tried of what is taken


def test_the_files_are_always_the_same():
    assert list(hostile_files()) == list(hostile_files())
    assert all(len(name) < 64 and "/" not in name for name, _, _ in hostile_files())


_GOOD = [content for _, content, _ in good_files() if len(content) < 1000]


@settings(deadline=None, max_examples=400)
@given(st.data())
def test_files_that_are_spoiled_at_random(data):
    content = bytearray(data.draw(st.sampled_from(_GOOD)))
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(content)))
        end = data.draw(st.integers(start, min(len(content), start + 20)))
        content[start:end] = data.draw(st.binary(max_size=8) | st.sampled_from(_PIECES))
    check(bytes(content))


_PIECES = [
    b"<",
    b">",
    b"</movement>",
    b"<movement>",
    b"&amp;",
    b"-",
    b"1e9",
    b"<![CDATA[",
    b"]]>",
    b"SOFTINST-8",
]
