"""Every Triton kernel of npo_kernels, one file per kernel family. Launched by `npo_kernels.backends.triton` alone.

| file              | kernels                                     | what                                      |
|-------------------|---------------------------------------------|-------------------------------------------|
| target_logit      | target_logit                                | z_y of each row, a gathered dot           |
| exp_logits        | exp_logits, exp_logits_persistent           | product, exponentials, partial sums       |
| row_statistics    | reanchor, row_statistics                    | overflow repair; logp and 1 - p_y         |
| sequence_epilogue | sequence_sums, ratio_epilogue               | segment sum, NPO log-sigmoid, row factors |
| linear_kl         | softmax_sums, kl_logits                     | two products, KL and p - q of their tiles |
| gradient_rows     | scale_rows, finish_hidden_grad, add_targets | O(NH) parts of dHidden and dWeight        |
| common            | log1p, softplus, sigmoid, tanh, place,      | device functions                          |
|                   | project                                     |                                           |
| tiles             |                                             | the table of tile shapes: data, no code   |

Conventions: N rows, H hidden size, V columns of the vocabulary (or of a slice of it), B sequences. Row and column
offsets are int64 before they are multiplied by a stride. Loads are upcast to float32 at once. Ragged edges are clamped
on load and masked on store: nothing outside a tensor is read, written or counted.
"""
