//! Ends cubes whose lifetime is over, while the server runs, and erases what could not be erased before.

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
        let ended = match blocking(move || catalog.expire()).await {
            Ok(ended) => service.end(ended).await,
            Err(error) => Err(error),
        };
        let ended = match ended {
            Ok(_) => service.catch_up().await,
            failed => failed,
        };
        if let Err(error) = ended {
            tracing::warn!(message = %error.object().message, "cubes past their lifetime, or their blocks, stay for now");
        }
    }
}
