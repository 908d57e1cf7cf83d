"""What connects ModelBatch with other libraries; each needs an extra of its own."""
