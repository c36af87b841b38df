"""CCM on the path mixture of the main job, in three dimensions; resumable (docs/ccm_latent.md)."""
