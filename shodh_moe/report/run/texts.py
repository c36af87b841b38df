"""Captions and explanations of the report of a run."""

from __future__ import annotations

INTRODUCTION = """Where the two papers behind this software give no formula, the definition is ours and is marked
(ours). Compare a number with a paper's only with both definitions side by side."""

SUMMARY = """Lower is better in every row. **Persistence** predicts that nothing changes; the **mean** predictor
always predicts the average of the training split. A model that does not beat both adds nothing to them.
**Tokenizer alone** is the error that compressing and decompressing the true field already makes. Latent MSE:
mean squared error of the normalised latents (per channel, training split). Physical MSE: the same of the decoded
fields divided by their training rms. VRMSE: root mean square error over the spatial standard deviation, so that 1
is what a spatial mean scores; the three components of the velocity count together (ours: the package of The Well
scores each component by itself). nRMSE: relative L2 error. All cells count, solid ones too; values are averaged
over snapshots and trajectories. The task (next-snapshot latent, residual prediction) is ours."""

FIELDS = """One held-out example, predicted one snapshot ahead and decoded. True and predicted share one colour
scale; the error (predicted minus true) has its own, white where they agree. Hatched cells are solid; field values
there are not drawn. Speeds are in lattice units, cells per time step."""

SPECTRA = """Kinetic energy per mass by length scale: small k (left) are large eddies, large k are details. A
prediction below the black line at large k is too smooth; the tokenizer's line shows how much of that was lost before
the transformer saw it. Energy is summed over shells of |k| and adds up to half the mean square velocity; beyond the
vertical line only the corners of the wave-number cube contribute. The box is treated as periodic, so walls and
solids add a tail at large k."""

BANDS = """Power of the error over power of the truth in three bands of wave number, equally wide in log k (The
Well's bins, components of the velocity taken together; the lowest band holds the mean flow). 0 is perfect, 1 is
what predicting nothing in that band scores."""

ROLLOUT = """The model's own predictions are fed back as input. nRMSE is the L2 norm of the velocity's error over
that of the true velocity. A prediction is useful as long as it stays below the dotted line, which repeats the last
given snapshot. Shading, where drawn, runs from the lowest to the highest trajectory. The rollout protocol is ours."""

LOAD = """Each bar is one layer; its colours are the shares of the domain's tokens that the router sent to each
expert, before any is dropped. If the domains' bars have different single colours, the layer has given each domain
its own expert."""

ROUTING_TABLE = """Purity: share of a domain's tokens at its majority expert. A layer is **bifurcated** when the
domains' majority experts all differ and every purity is at least 0.99 (ours). Dropped share: tokens that found
their expert full and passed only through the shared experts and the residual. Router entropy: mean over tokens of
-sum p ln p; 0 is a certain router."""

INFORMATION = """How much the chosen expert reveals about where the token came from: 0 is nothing; with two domains of
equal size it can reveal at most ln 2 = 0.693 nats about the domain. A value with the solid fraction as high as
with the domain means that the router may only be reading the mask (ours)."""

ROUTING_MAP = """The middle plane of the token grid of one example: colour is the expert chosen (white: token
dropped, where that was recorded), beside the share of each token's cells that is solid. Patches that follow the
solid show a router that reads geometry; one colour everywhere, another in each domain, shows one that reads the
domain."""

LOSSES = """Logarithmic axes. Training: the total and its parts. Held-out data: latent MSE of each domain with its
persistence baseline dotted in the same colour; the solid line must fall below it. Tokenizer: errors of its
reconstruction of normalised fields, if its training was recorded."""

LOAD_STEPS = """Top: share of each domain's tokens per expert during training (with more than four experts, the
share at the busiest one). Bottom: share of tokens dropped for lack of capacity. A split between the domains shows
as lines that diverge and stay apart; a dropped share that does not fall suggests a capacity factor too small for the
mix of domains in a batch."""

DIVERGENCE = """How much fluid the predicted velocity creates or destroys. The number depends on the derivative
operator and the arithmetic, so both are given. With the operator of a Helmholtz decoder it is rounding error by
construction; any other operator adds the difference between the two. A direct decoder's velocity is divergence-free for
no operator. The staggered operator uses the velocities on the cells' faces; those at the centres are their means. True
fields are not divergence-free either: lattice Boltzmann flow is weakly compressible. h is the grid spacing in cells;
rms(u) is the rms of the speed."""
