"""The audit chain: every edit behind the store's back is seen."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from rlhf_nb.errors import DataError, StoreError
from rlhf_nb.store.schema import audit


@pytest.fixture
def chain(store):
    for number in range(5):
        store.append_audit("set", "ppo-1", {"kl_coef": number / 10, "why": "müde"}, who="mira")
    return store


def _behind_the_back(store, *statements):
    """What somebody with the file and a database tool can do."""
    with store._engine.begin() as connection:
        if store.directory is not None:
            for verb in ("update", "delete"):
                connection.exec_driver_sql(f"DROP TRIGGER audit_refuse_{verb}")
        else:
            connection.exec_driver_sql("DROP TRIGGER audit_append_only ON audit")
        for statement in statements:
            connection.execute(statement)


def test_an_untouched_chain_is_whole(chain):
    check = chain.verify_audit()
    assert check and check.n == 5
    assert check.head == chain.audit()[-1].hash
    assert [row.detail["kl_coef"] for row in chain.audit()] == [0, 0.1, 0.2, 0.3, 0.4]


def test_an_empty_chain_is_whole(store):
    assert store.verify_audit().n == 0


@pytest.mark.parametrize("column", ["detail", "who", "created", "action", "subject"])
def test_a_changed_row_is_found(chain, column):
    value = '{"kl_coef":9}' if column == "detail" else "someone else"
    _behind_the_back(chain, sa.update(audit).where(audit.c.seq == 3).values({column: value}))
    check = chain.verify_audit()
    assert not check
    assert (check.broken_seq, check.reason) == (3, "its content does not have its hash")


def test_a_removed_row_is_found(chain):
    _behind_the_back(chain, sa.delete(audit).where(audit.c.seq == 2))
    check = chain.verify_audit()
    assert (check.ok, check.broken_seq, check.reason) == (False, 3, "row 2 is missing")


def test_a_row_rewritten_with_a_fitting_hash_breaks_the_next(chain):
    from rlhf_nb.store.audit import _link

    with chain._read() as connection:
        row = dict(connection.execute(sa.select(audit).where(audit.c.seq == 3)).mappings().one())
    row["detail"] = "{}"
    row["hash"] = _link(row)
    _behind_the_back(chain, sa.update(audit).where(audit.c.seq == 3).values(row))
    check = chain.verify_audit()
    assert (check.ok, check.broken_seq, check.reason) == (False, 4, "it does not follow the row before")


def test_cutting_off_the_end_is_seen_against_a_noted_head(chain):
    head = chain.verify_audit().head
    assert chain.verify_audit(expected_head=head)
    _behind_the_back(chain, sa.delete(audit).where(audit.c.seq == 5))
    assert chain.verify_audit()
    check = chain.verify_audit(expected_head=head)
    assert not check and "noted head" in check.reason


@pytest.mark.parametrize("statement", ["UPDATE audit SET who = 'x'", "DELETE FROM audit"])
def test_the_database_itself_refuses_to_edit_the_chain(chain, statement):
    with pytest.raises(StoreError, match="audit is append-only"), chain._write() as connection:
        connection.exec_driver_sql(statement)
    assert chain.verify_audit().n == 5


def test_the_chain_is_read_by_subject_action_and_tail(chain):
    chain.append_audit("import", "hh")
    assert len(chain.audit(subject="hh")) == len(chain.audit(action="import")) == 1
    assert [row.seq for row in chain.audit(limit=2)] == [5, 6]
    assert chain.audit()[-1].who


def test_a_detail_that_has_no_json_form_is_refused(store):
    with pytest.raises(DataError):
        store.append_audit("set", "ppo-1", {"value": float("nan")})
    assert store.verify_audit().n == 0
