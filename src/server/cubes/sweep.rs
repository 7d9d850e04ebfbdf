//! Ends cubes whose lifetime is over, while the server runs.

use std::time::Duration;

use super::{blocking, service};
use crate::server::AppRef;

/// Time between two looks. A cube ends at the second look that finds it past its lifetime; hidden it is at once.
const SWEEP_INTERVAL: Duration = Duration::from_secs(30);

/// Looks every so often; never returns.
pub(in crate::server) async fn sweep(app: AppRef) {
    let Ok(service) = service(&app) else { return std::future::pending().await };
    loop {
        tokio::time::sleep(SWEEP_INTERVAL).await;
        let catalog = service.catalog.clone();
        match blocking(move || catalog.expire()).await {
            Ok(ended) => service.engine.release(ended.unreferenced),
            Err(error) => tracing::warn!(message = %error.object().message, "cubes past their lifetime stay for now"),
        }
    }
}
