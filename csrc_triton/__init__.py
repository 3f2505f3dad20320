"""Every Triton kernel of npo_kernels, one file per kernel family. Launched by `npo_kernels.backends.triton` alone.

| file              | kernels                                         | what                                      |
|-------------------|-------------------------------------------------|-------------------------------------------|
| target_logit      | target_logit_kernel                             | z_y of each row, a gathered dot           |
| exp_logits        | exp_logits_kernel, exp_logits_persistent_kernel | product, exponentials, partial sums       |
| row_statistics    | reanchor_kernel, row_statistics_kernel          | overflow repair; logp and 1 - p_y         |
| sequence_epilogue | sequence_sums_kernel, ratio_epilogue_kernel     | segment sum, NPO log-sigmoid, row factors |
| linear_kl         | softmax_sums_kernel, kl_logits_kernel           | two products, KL and p - q of their tiles |
| gradient_rows     | scale_rows_kernel, finish_hidden_grad_kernel,   | O(NH) parts of dHidden and dWeight        |
|                   | add_targets_kernel, scale_gradient_kernel       | and their product with the upstream one   |
| common            | log1p, softplus, sigmoid, tanh, place, project, | device functions                          |
|                   | project_descriptors, place_step                 |                                           |
| tiles             |                                                 | the table of tile shapes: data, no code   |

Names: what is launched with a grid ends in `_kernel`; the launchers and their PyTorch twins in `npo_kernels.backends`
have names without the suffix. So have device functions, which only kernels call.

Conventions: N rows, H hidden size, V columns of the vocabulary (or of a slice of it), B sequences. Row and column
offsets are int64 before they are multiplied by a stride. Loads are upcast to float32 at once. Ragged edges are clamped
on load and masked on store: nothing outside a tensor is read, written or counted.
"""
