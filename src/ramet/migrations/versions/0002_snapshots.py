"""snapshots, and what machines stand on"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

_OF_MACHINES = ("source_id", "snapshot_id", "memory_layer", "pool")


def upgrade() -> None:
    for name in _OF_MACHINES:
        op.add_column("machines", sa.Column(name, sa.String, nullable=False, server_default=""))
    op.create_table(
        "snapshots",
        sa.Column("id", sa.String, primary_key=True),
        sa.Column("name", sa.String, nullable=False),
        sa.Column("machine", sa.String, nullable=False),
        sa.Column("state", sa.String, nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("memory", sa.Boolean, nullable=False),
        sa.Column("spec", sa.Text, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("parent", sa.String, nullable=False),
        sa.Column("image_digest", sa.String, nullable=False),
        sa.Column("disk_layer", sa.String, nullable=False),
        sa.Column("memory_layer", sa.String, nullable=False),
        sa.Column("template", sa.Boolean, nullable=False),
        sa.Column("pool", sa.Integer, nullable=False),
        sa.Column("pause", sa.Float),
        sa.Column("compatibility", sa.Text),
    )
    op.create_index("snapshots_name", "snapshots", ["name"], unique=True, sqlite_where=sa.text("name != ''"))


def downgrade() -> None:
    op.drop_table("snapshots")
    for name in _OF_MACHINES:
        op.drop_column("machines", name)
