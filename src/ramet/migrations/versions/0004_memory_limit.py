"""what machines' memory is limited to, and was when they were saved"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"

_TABLES = ("machines", "snapshots")


def upgrade() -> None:
    for table in _TABLES:
        op.add_column(table, sa.Column("memory_limit", sa.Integer, nullable=False, server_default="0"))


def downgrade() -> None:
    for table in _TABLES:
        op.drop_column(table, "memory_limit")
