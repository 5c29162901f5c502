"""The first schema."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Make all tables."""
    op.create_table(
        "adapter",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("owner", sa.String(length=255), nullable=False),
        sa.Column("tenant", sa.String(length=255), nullable=True),
        sa.Column("description", sa.Text(), nullable=False),
        sa.Column("next_version", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("created_by", sa.String(length=255), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_adapter")),
        sa.UniqueConstraint("name", name=op.f("uq_adapter_name")),
    )
    op.create_table(
        "audit_event",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("actor", sa.String(length=255), nullable=False),
        sa.Column("action", sa.String(length=255), nullable=False),
        sa.Column("subject", sa.String(length=255), nullable=False),
        sa.Column("payload", sa.JSON(), nullable=False),
        sa.Column("previous_hash", sa.String(length=64), nullable=False),
        sa.Column("hash", sa.String(length=64), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_audit_event")),
        sa.UniqueConstraint("hash", name=op.f("uq_audit_event_hash")),
    )
    op.create_index(op.f("ix_audit_event_action"), "audit_event", ["action"], unique=False)
    op.create_index(op.f("ix_audit_event_subject"), "audit_event", ["subject"], unique=False)
    op.create_table(
        "base_model",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("revision", sa.String(length=255), nullable=True),
        sa.Column("fingerprint", sa.JSON(), nullable=False),
        sa.Column("anchor_digest", sa.String(length=255), nullable=False),
        sa.Column("fingerprint_digest", sa.String(length=255), nullable=False),
        sa.Column("quantization", sa.String(length=255), nullable=True),
        sa.Column("num_parameters", sa.BigInteger(), nullable=True),
        sa.Column("license", sa.String(length=255), nullable=True),
        sa.Column("derived_from_id", sa.Integer(), nullable=True),
        sa.Column("derivation", sa.String(length=255), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["derived_from_id"], ["base_model.id"], name=op.f("fk_base_model_derived_from_id_base_model")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_base_model")),
        sa.UniqueConstraint("fingerprint_digest", name=op.f("uq_base_model_fingerprint_digest")),
    )
    op.create_index(op.f("ix_base_model_anchor_digest"), "base_model", ["anchor_digest"], unique=False)
    op.create_index(op.f("ix_base_model_derived_from_id"), "base_model", ["derived_from_id"], unique=False)
    op.create_table(
        "blob",
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("state", sa.String(length=32), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("digest", name=op.f("pk_blob")),
    )
    op.create_table(
        "dataset",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("owner", sa.String(length=255), nullable=False),
        sa.Column("license", sa.String(length=255), nullable=True),
        sa.Column("legal_basis", sa.String(length=255), nullable=True),
        sa.Column("purpose", sa.Text(), nullable=True),
        sa.Column("is_special_category", sa.Boolean(), nullable=False),
        sa.Column("retention_until", sa.DateTime(timezone=True), nullable=True),
        sa.Column("next_version", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_dataset")),
        sa.UniqueConstraint("name", name=op.f("uq_dataset_name")),
    )
    op.create_table(
        "erasure_request",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("kind", sa.String(length=255), nullable=False),
        sa.Column("target_digest", sa.String(length=255), nullable=False),
        sa.Column("reference", sa.String(length=255), nullable=True),
        sa.Column("state", sa.String(length=255), nullable=False),
        sa.Column("due_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("created_by", sa.String(length=255), nullable=False),
        sa.Column("certificate", sa.JSON(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_erasure_request")),
    )
    op.create_index(op.f("ix_erasure_request_target_digest"), "erasure_request", ["target_digest"], unique=False)
    op.create_table(
        "outbox",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("event", sa.String(length=255), nullable=False),
        sa.Column("payload", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("delivered_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_outbox")),
    )
    op.create_index(op.f("ix_outbox_delivered_at"), "outbox", ["delivered_at"], unique=False)
    op.create_table(
        "signature",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("digest", sa.String(length=255), nullable=False),
        sa.Column("key_id", sa.String(length=255), nullable=False),
        sa.Column("envelope", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_signature")),
    )
    op.create_index(op.f("ix_signature_digest"), "signature", ["digest"], unique=False)
    op.create_table(
        "surface",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("audience", sa.String(length=32), nullable=False),
        sa.Column("owner", sa.String(length=255), nullable=False),
        sa.Column("rules", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_surface")),
        sa.UniqueConstraint("name", name=op.f("uq_surface_name")),
    )
    op.create_index(op.f("ix_surface_audience"), "surface", ["audience"], unique=False)
    op.create_table(
        "adapter_version",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("adapter_id", sa.Integer(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("manifest_digest", sa.String(length=255), nullable=False),
        sa.Column("lineage_digest", sa.String(length=255), nullable=False),
        sa.Column("base_model_id", sa.Integer(), nullable=True),
        sa.Column("peft_type", sa.String(length=255), nullable=False),
        sa.Column("rank", sa.Integer(), nullable=False),
        sa.Column("alpha", sa.Double(), nullable=False),
        sa.Column("target_modules", sa.JSON(), nullable=False),
        sa.Column("num_parameters", sa.BigInteger(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("lifecycle", sa.String(length=32), nullable=False),
        sa.Column("hold_reason", sa.Text(), nullable=True),
        sa.Column("license", sa.String(length=255), nullable=True),
        sa.Column("intended_use", sa.Text(), nullable=True),
        sa.Column("limitations", sa.Text(), nullable=True),
        sa.Column("consent", sa.Text(), nullable=True),
        sa.Column("no_data_reason", sa.Text(), nullable=True),
        sa.Column("recipe", sa.JSON(), nullable=False),
        sa.Column("metrics", sa.JSON(), nullable=False),
        sa.Column("environment", sa.JSON(), nullable=False),
        sa.Column("run_id", sa.String(length=255), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("created_by", sa.String(length=255), nullable=False),
        sa.ForeignKeyConstraint(["adapter_id"], ["adapter.id"], name=op.f("fk_adapter_version_adapter_id_adapter")),
        sa.ForeignKeyConstraint(["base_model_id"], ["base_model.id"], name=op.f("fk_adapter_version_base_model_id_base_model")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_adapter_version")),
        sa.UniqueConstraint("adapter_id", "version", name=op.f("uq_adapter_version_adapter_id_version")),
    )
    op.create_index(op.f("ix_adapter_version_base_model_id"), "adapter_version", ["base_model_id"], unique=False)
    op.create_index(op.f("ix_adapter_version_lifecycle"), "adapter_version", ["lifecycle"], unique=False)
    op.create_index(op.f("ix_adapter_version_manifest_digest"), "adapter_version", ["manifest_digest"], unique=False)
    op.create_index(op.f("ix_adapter_version_run_id"), "adapter_version", ["run_id"], unique=False)
    op.create_table(
        "blocked",
        sa.Column("digest", sa.String(length=255), nullable=False),
        sa.Column("request_id", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["request_id"], ["erasure_request.id"], name=op.f("fk_blocked_request_id_erasure_request")),
        sa.PrimaryKeyConstraint("digest", name=op.f("pk_blocked")),
    )
    op.create_table(
        "dataset_version",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("dataset_id", sa.Integer(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("digest", sa.String(length=255), nullable=False),
        sa.Column("location", sa.Text(), nullable=True),
        sa.Column("num_rows", sa.BigInteger(), nullable=True),
        sa.Column("state", sa.String(length=32), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["dataset_id"], ["dataset.id"], name=op.f("fk_dataset_version_dataset_id_dataset")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_dataset_version")),
        sa.UniqueConstraint("dataset_id", "version", name=op.f("uq_dataset_version_dataset_id_version")),
    )
    op.create_index(op.f("ix_dataset_version_digest"), "dataset_version", ["digest"], unique=False)
    op.create_table(
        "erasure_item",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("request_id", sa.Integer(), nullable=False),
        sa.Column("kind", sa.String(length=255), nullable=False),
        sa.Column("target", sa.Text(), nullable=False),
        sa.Column("decision", sa.String(length=255), nullable=True),
        sa.Column("state", sa.String(length=255), nullable=False),
        sa.Column("evidence", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(["request_id"], ["erasure_request.id"], name=op.f("fk_erasure_item_request_id_erasure_request")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_erasure_item")),
    )
    op.create_index(op.f("ix_erasure_item_request_id"), "erasure_item", ["request_id"], unique=False)
    op.create_table(
        "experiment",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("surface_id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("salt", sa.String(length=255), nullable=False),
        sa.Column("unit", sa.String(length=255), nullable=False),
        sa.Column("epoch", sa.Integer(), nullable=False),
        sa.Column("guardrail", sa.JSON(), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["surface_id"], ["surface.id"], name=op.f("fk_experiment_surface_id_surface")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_experiment")),
        sa.UniqueConstraint("surface_id", "name", name=op.f("uq_experiment_surface_id_name")),
    )
    op.create_table(
        "adapter_dataset",
        sa.Column("version_id", sa.Integer(), nullable=False),
        sa.Column("dataset_version_id", sa.Integer(), nullable=False),
        sa.Column("role", sa.String(length=255), nullable=False),
        sa.ForeignKeyConstraint(
            ["dataset_version_id"], ["dataset_version.id"], name=op.f("fk_adapter_dataset_dataset_version_id_dataset_version")
        ),
        sa.ForeignKeyConstraint(
            ["version_id"], ["adapter_version.id"], name=op.f("fk_adapter_dataset_version_id_adapter_version")
        ),
        sa.PrimaryKeyConstraint("version_id", "dataset_version_id", "role", name=op.f("pk_adapter_dataset")),
    )
    op.create_index(op.f("ix_adapter_dataset_dataset_version_id"), "adapter_dataset", ["dataset_version_id"], unique=False)
    op.create_table(
        "adapter_file",
        sa.Column("version_id", sa.Integer(), nullable=False),
        sa.Column("path", sa.String(length=255), nullable=False),
        sa.Column("blob_digest", sa.String(length=64), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["blob_digest"], ["blob.digest"], name=op.f("fk_adapter_file_blob_digest_blob")),
        sa.ForeignKeyConstraint(["version_id"], ["adapter_version.id"], name=op.f("fk_adapter_file_version_id_adapter_version")),
        sa.PrimaryKeyConstraint("version_id", "path", name=op.f("pk_adapter_file")),
    )
    op.create_index(op.f("ix_adapter_file_blob_digest"), "adapter_file", ["blob_digest"], unique=False)
    op.create_table(
        "adapter_parent",
        sa.Column("child_id", sa.Integer(), nullable=False),
        sa.Column("parent_id", sa.Integer(), nullable=False),
        sa.Column("relation", sa.String(length=255), nullable=False),
        sa.ForeignKeyConstraint(["child_id"], ["adapter_version.id"], name=op.f("fk_adapter_parent_child_id_adapter_version")),
        sa.ForeignKeyConstraint(["parent_id"], ["adapter_version.id"], name=op.f("fk_adapter_parent_parent_id_adapter_version")),
        sa.PrimaryKeyConstraint("child_id", "parent_id", name=op.f("pk_adapter_parent")),
    )
    op.create_index(op.f("ix_adapter_parent_parent_id"), "adapter_parent", ["parent_id"], unique=False)
    op.create_table(
        "alias",
        sa.Column("adapter_id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("version_id", sa.Integer(), nullable=False),
        sa.Column("is_protected", sa.Boolean(), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["adapter_id"], ["adapter.id"], name=op.f("fk_alias_adapter_id_adapter")),
        sa.ForeignKeyConstraint(["version_id"], ["adapter_version.id"], name=op.f("fk_alias_version_id_adapter_version")),
        sa.PrimaryKeyConstraint("adapter_id", "name", name=op.f("pk_alias")),
    )
    op.create_index(op.f("ix_alias_version_id"), "alias", ["version_id"], unique=False)
    op.create_table(
        "approval",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("version_id", sa.Integer(), nullable=False),
        sa.Column("surface_id", sa.Integer(), nullable=True),
        sa.Column("actor", sa.String(length=255), nullable=False),
        sa.Column("role", sa.String(length=255), nullable=False),
        sa.Column("is_granted", sa.Boolean(), nullable=False),
        sa.Column("comment", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["surface_id"], ["surface.id"], name=op.f("fk_approval_surface_id_surface")),
        sa.ForeignKeyConstraint(["version_id"], ["adapter_version.id"], name=op.f("fk_approval_version_id_adapter_version")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_approval")),
    )
    op.create_index(op.f("ix_approval_version_id"), "approval", ["version_id"], unique=False)
    op.create_table(
        "copy_elsewhere",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("version_id", sa.Integer(), nullable=True),
        sa.Column("dataset_version_id", sa.Integer(), nullable=True),
        sa.Column("kind", sa.String(length=255), nullable=False),
        sa.Column("location", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["dataset_version_id"], ["dataset_version.id"], name=op.f("fk_copy_elsewhere_dataset_version_id_dataset_version")
        ),
        sa.ForeignKeyConstraint(
            ["version_id"], ["adapter_version.id"], name=op.f("fk_copy_elsewhere_version_id_adapter_version")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_copy_elsewhere")),
    )
    op.create_index(op.f("ix_copy_elsewhere_dataset_version_id"), "copy_elsewhere", ["dataset_version_id"], unique=False)
    op.create_index(op.f("ix_copy_elsewhere_version_id"), "copy_elsewhere", ["version_id"], unique=False)
    op.create_table(
        "dataset_parent",
        sa.Column("child_id", sa.Integer(), nullable=False),
        sa.Column("parent_id", sa.Integer(), nullable=False),
        sa.Column("transform", sa.String(length=255), nullable=False),
        sa.ForeignKeyConstraint(["child_id"], ["dataset_version.id"], name=op.f("fk_dataset_parent_child_id_dataset_version")),
        sa.ForeignKeyConstraint(["parent_id"], ["dataset_version.id"], name=op.f("fk_dataset_parent_parent_id_dataset_version")),
        sa.PrimaryKeyConstraint("child_id", "parent_id", name=op.f("pk_dataset_parent")),
    )
    op.create_index(op.f("ix_dataset_parent_parent_id"), "dataset_parent", ["parent_id"], unique=False)
    op.create_table(
        "dataset_subject",
        sa.Column("dataset_version_id", sa.Integer(), nullable=False),
        sa.Column("subject_hmac", sa.LargeBinary(length=32), nullable=False),
        sa.ForeignKeyConstraint(
            ["dataset_version_id"], ["dataset_version.id"], name=op.f("fk_dataset_subject_dataset_version_id_dataset_version")
        ),
        sa.PrimaryKeyConstraint("dataset_version_id", "subject_hmac", name=op.f("pk_dataset_subject")),
    )
    op.create_index(op.f("ix_dataset_subject_subject_hmac"), "dataset_subject", ["subject_hmac"], unique=False)
    op.create_table(
        "deployment",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("version_id", sa.Integer(), nullable=False),
        sa.Column("surface_id", sa.Integer(), nullable=False),
        sa.Column("experiment_id", sa.Integer(), nullable=True),
        sa.Column("epoch", sa.Integer(), nullable=True),
        sa.Column("weight_bp", sa.Integer(), nullable=False),
        sa.Column("forced_reason", sa.Text(), nullable=True),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("started_by", sa.String(length=255), nullable=False),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("acknowledged_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["experiment_id"], ["experiment.id"], name=op.f("fk_deployment_experiment_id_experiment")),
        sa.ForeignKeyConstraint(["surface_id"], ["surface.id"], name=op.f("fk_deployment_surface_id_surface")),
        sa.ForeignKeyConstraint(["version_id"], ["adapter_version.id"], name=op.f("fk_deployment_version_id_adapter_version")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_deployment")),
    )
    op.create_index(op.f("ix_deployment_surface_id_ended_at"), "deployment", ["surface_id", "ended_at"], unique=False)
    op.create_index(op.f("ix_deployment_version_id_ended_at"), "deployment", ["version_id", "ended_at"], unique=False)
    op.create_table(
        "eval_run",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("version_id", sa.Integer(), nullable=True),
        sa.Column("base_model_id", sa.Integer(), nullable=True),
        sa.Column("suite", sa.String(length=255), nullable=False),
        sa.Column("suite_digest", sa.String(length=255), nullable=False),
        sa.Column("dtype", sa.String(length=255), nullable=True),
        sa.Column("quantization", sa.String(length=255), nullable=True),
        sa.Column("metrics", sa.JSON(), nullable=False),
        sa.Column("scores_digest", sa.String(length=64), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["base_model_id"], ["base_model.id"], name=op.f("fk_eval_run_base_model_id_base_model")),
        sa.ForeignKeyConstraint(["scores_digest"], ["blob.digest"], name=op.f("fk_eval_run_scores_digest_blob")),
        sa.ForeignKeyConstraint(["version_id"], ["adapter_version.id"], name=op.f("fk_eval_run_version_id_adapter_version")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_eval_run")),
    )
    op.create_index(op.f("ix_eval_run_base_model_id"), "eval_run", ["base_model_id"], unique=False)
    op.create_index(op.f("ix_eval_run_version_id"), "eval_run", ["version_id"], unique=False)
    op.create_table(
        "exposure",
        sa.Column("experiment_id", sa.Integer(), nullable=False),
        sa.Column("epoch", sa.Integer(), nullable=False),
        sa.Column("version_id", sa.Integer(), nullable=False),
        sa.Column("count", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["experiment_id"], ["experiment.id"], name=op.f("fk_exposure_experiment_id_experiment")),
        sa.ForeignKeyConstraint(["version_id"], ["adapter_version.id"], name=op.f("fk_exposure_version_id_adapter_version")),
        sa.PrimaryKeyConstraint("experiment_id", "epoch", "version_id", name=op.f("pk_exposure")),
    )
    op.create_table(
        "gate_decision",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("version_id", sa.Integer(), nullable=False),
        sa.Column("manifest_digest", sa.String(length=255), nullable=False),
        sa.Column("base_model_id", sa.Integer(), nullable=True),
        sa.Column("baseline", sa.String(length=255), nullable=False),
        sa.Column("policy", sa.String(length=255), nullable=False),
        sa.Column("policy_digest", sa.String(length=255), nullable=False),
        sa.Column("verdict", sa.String(length=32), nullable=False),
        sa.Column("report_digest", sa.String(length=64), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("created_by", sa.String(length=255), nullable=False),
        sa.ForeignKeyConstraint(["base_model_id"], ["base_model.id"], name=op.f("fk_gate_decision_base_model_id_base_model")),
        sa.ForeignKeyConstraint(["report_digest"], ["blob.digest"], name=op.f("fk_gate_decision_report_digest_blob")),
        sa.ForeignKeyConstraint(["version_id"], ["adapter_version.id"], name=op.f("fk_gate_decision_version_id_adapter_version")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_gate_decision")),
    )
    op.create_index(op.f("ix_gate_decision_version_id"), "gate_decision", ["version_id"], unique=False)
