"""machines"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "machines",
        sa.Column("id", sa.String, primary_key=True),
        sa.Column("name", sa.String, nullable=False, unique=True),
        sa.Column("state", sa.String, nullable=False),
        sa.Column("spec", sa.Text, nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("image_digest", sa.String, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("started_at", sa.Float),
        sa.Column("boot_time", sa.Float),
        sa.Column("initialised", sa.Boolean, nullable=False),
        sa.Column("accelerator", sa.String),
        sa.Column("kernel", sa.String, nullable=False),
    )


def downgrade() -> None:
    op.drop_table("machines")
