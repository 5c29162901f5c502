"""Which servers hold which versions."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Make the table of what servers hold."""
    op.create_table(
        "holding",
        sa.Column("server", sa.String(length=255), nullable=False),
        sa.Column("version_id", sa.Integer(), nullable=False),
        sa.Column("seen_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["version_id"], ["adapter_version.id"], name=op.f("fk_holding_version_id_adapter_version")),
        sa.PrimaryKeyConstraint("server", "version_id", name=op.f("pk_holding")),
    )
    op.create_index(op.f("ix_holding_version_id"), "holding", ["version_id"], unique=False)
