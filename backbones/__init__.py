"""Networks: trunks (DiT, U-Net, MLP), the (t, r) embedding and the heads. Importing it registers all."""
